"""Algorithms give what brute force gives: a few architectures each week, and what brute force itself sees."""

import datetime
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hookgraph.errors import LocationError
from hookgraph.locations import ATTN_Z, MLP_OUT
from hookgraph.ontology.locations import Location
from hookgraph_tests.sweep import page
from hookgraph_tests.sweep.effects.double import doubled
from hookgraph_tests.sweep.effects.findings import Finding, compared
from hookgraph_tests.sweep.effects.trials import corrupted
from hookgraph_tests.sweep.effects.trying import Effects, effects_of
from hookgraph_tests.unchecked import unchecked

TABLES = ("causal", "image-text")
NODES = [ATTN_Z[0], MLP_OUT[0], MLP_OUT[1]]


def of_this_week() -> Iterator[tuple[str, str]]:
    """An architecture of each of some mappings: the same for a week, so that a failure can be looked into."""
    week = datetime.datetime.now(tz=datetime.UTC).isocalendar()
    chance = random.Random(f"{week.year}-{week.week}-effects")
    recorded = page.read()
    for table in TABLES:
        small = [
            o for o in recorded if o.table == table and o.status == "bound" and sum(o.layers.values()) < 5
        ]
        yield table, chance.choice(small).architecture


@pytest.mark.parametrize(("table", "architecture"), [*of_this_week()])
def test_effects_are_those_of_brute_force(table: str, architecture: str):
    with unchecked():
        found = effects_of(table, architecture)
    assert found.status == "ok", "\n".join(found.lines())


def test_a_wrong_number_is_told_with_its_node():
    right = {node: torch.tensor([1.0, 2.0]) for node in NODES}

    def measure(nodes: list[Location]) -> Tensor:
        return torch.stack([right[x] + (0.5 if x == MLP_OUT[1] else 0.0) for x in nodes])

    (found,) = compared("exact", NODES, measure, right, torch.ones(2))
    assert found.failed
    assert "1 of 3 nodes, such as mlp.out[1]: [1.5, 2.5] is [1.0, 2.0]" in found.detail


def test_a_refusal_of_one_kind_of_node_leaves_the_others():
    right = {node: torch.tensor([1.0]) for node in NODES}

    def measure(nodes: list[Location]) -> Tensor:
        if ATTN_Z[0] in nodes:
            raise LocationError("no heads here")
        return torch.stack([right[x] for x in nodes])

    found = [*compared("exact", NODES, measure, right, torch.ones(1))]
    assert [(x.verdict, x.count) for x in found] == [("refused", 1), ("ok", 2)]
    told = [*Effects("causal", "gpt2", tuple(found)).lines()]
    assert told[1].strip() == "exact refused: LocationError: no heads here (1 nodes, such as attn.z[0])"
    assert Effects("causal", "gpt2", (Finding("all", "raised"),)).status == "failed"


def test_single_precision_is_double_within_the_context():
    with doubled():
        assert torch.zeros(2).dtype == torch.ones(2, dtype=torch.int).float().dtype == torch.float64
        assert torch.ones(2).softmax(0, dtype=torch.float32).dtype == torch.float64
    assert torch.zeros(2).dtype == torch.float32


def test_corrupt_inputs_keep_placeholders_and_masks():
    ids, mask = torch.tensor([[99, 20, 30]]), torch.ones(1, 3, dtype=torch.long)
    found = corrupted({"input_ids": ids, "attention_mask": mask}, {99})
    assert found["input_ids"][0, 0] == 99
    assert not (found["input_ids"][0, 1:] == ids[0, 1:]).any()
    assert torch.equal(found["attention_mask"], mask)
