"""Inputs by their examples, in containers too."""

from collections import OrderedDict

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from hookgraph.errors import InputError
from hookgraph.graph.examples import batch_size, changed, count_examples, named_tensors, rows_of

STATES = torch.arange(12.0).view(3, 2, 2)
NESTED = {
    "encoder_outputs": BaseModelOutput(last_hidden_state=STATES, hidden_states=(STATES, STATES + 1)),  # pyright: ignore[reportArgumentType]
    "masks": {"full": [STATES[:, 0]], "none": None},
    "ids": torch.arange(3)[:, None],
    "positions": torch.arange(2)[None],
    "use_cache": False,
}


def test_tensors_in_containers_are_divided_with_the_others():
    found = rows_of(NESTED, torch.tensor([2, 0]), 3)
    outputs = found["encoder_outputs"]
    assert isinstance(outputs, BaseModelOutput)
    assert torch.equal(outputs.last_hidden_state, STATES[[2, 0]])  # pyright: ignore[reportArgumentType]
    assert torch.equal(outputs.hidden_states[1], STATES[[2, 0]] + 1)  # pyright: ignore[reportOptionalSubscript]
    tensors = named_tensors(found)
    assert torch.equal(tensors["masks.full.0"], STATES[[2, 0], 0])
    assert tensors["positions"] is NESTED["positions"]
    assert tensors["ids"].flatten().tolist() == [2, 0]
    assert found["use_cache"] is False


def test_examples_are_counted_by_tensors_in_no_container_first():
    assert count_examples(NESTED) == 3
    assert count_examples({"a": (torch.zeros(5, 1),), "b": torch.zeros(2, 1)}) == 2
    assert count_examples({"a": (torch.zeros(5, 1),), "b": "text"}) == 5
    assert count_examples({"b": "text"}) is None
    with pytest.raises(InputError, match="this run holds no inputs"):
        batch_size({})


def test_what_is_changed_keeps_its_containers():
    found = changed(NESTED | {"ordered": OrderedDict(a=STATES)}, lambda x: x)
    assert [type(v) for v in found.values()] == [*map(type, NESTED.values()), OrderedDict]


@pytest.mark.parametrize("count", [2, 3])
def test_positions_in_time_and_space_are_divided_along_the_batch(count: int):
    positions = torch.arange(3 * count * 4).view(3, count, 4)
    found = rows_of({"input_ids": positions[0], "position_ids": positions}, slice(1, None), count)
    assert torch.equal(named_tensors(found)["position_ids"], positions[:, 1:])
    assert torch.equal(named_tensors(found)["input_ids"], positions[0, 1:])
