"""How large what stands in for locations is, told and drawn."""

import math
from pathlib import Path

import pytest
import torch

from hookgraph.algorithms import (
    AblationStatistics,
    SteeringVector,
    mean_activations,
    sample_activations,
    steering_vector,
)
from hookgraph.algorithms.interventions.norms import norm, norm_maps
from hookgraph.algorithms.interventions.statistics import with_optimal
from hookgraph.errors import HookGraphError
from hookgraph.locations import ATTN_OUT, ATTN_Z, MLP_OUT, RESID_POST
from hookgraph.ontology.dimensions import Dimension
from hookgraph_tests.families import bound, tokens
from hookgraph_tests.toy import toy_graph, toy_tokens


def means() -> AblationStatistics:
    return mean_activations(bound("gpt2", torch.float64), [tokens()], [ATTN_Z[0], ATTN_Z[1], MLP_OUT[1]])


def test_norms_are_of_vectors_and_averaged_over_examples_and_positions():
    value, dims = torch.randn(3, 4, 2, 5), (Dimension.BATCH, Dimension.POS, Dimension.HEAD, Dimension.D_HEAD)
    squares = value.double().square()
    assert torch.allclose(norm(value, dims), squares.sum((2, 3)).mean().sqrt())
    assert torch.allclose(norm(value, dims, Dimension.HEAD), squares.sum(3).mean((0, 1)).sqrt())
    value[0, 2:] = torch.nan  # an example of two tokens
    left = torch.cat([squares[0, :2], *squares[1:]])
    assert torch.allclose(norm(value, dims), left.sum((1, 2)).mean().sqrt())
    assert norm(value, dims, Dimension.POS).shape == (4,)


def test_means_tell_their_norms_and_how_far_constants_are_from_them():
    found = means()
    frame = found.to_frame()
    assert list(frame["location"]) == ["attn.z[0]", "attn.z[1]", "mlp.out[1]"]
    assert frame["values"].tolist() == [12] * 3
    assert frame["norm of the mean"][2] == pytest.approx(float(found.means[MLP_OUT[1]].norm()))
    moved = with_optimal(found, {MLP_OUT[1]: found.means[MLP_OUT[1]] + 1}, seed=0)
    apart = moved.to_frame()["apart"].tolist()
    assert math.isnan(apart[0])
    assert apart[2] == pytest.approx(math.sqrt(32))
    assert "norm of the mean" in found._repr_html_()
    maps = [x for x in found.plot().axes if x.get_title(loc="left")]
    assert [x.get_title(loc="left") for x in maps] == ["attn.z", "mlp.out"]
    assert [t.get_text() for t in maps[0].get_xticklabels()] == ["0", "1", "2", "3"]


def test_means_per_position_are_drawn_by_position():
    graph = bound("gpt2", torch.float64)
    found = mean_activations(graph, [tokens()], [MLP_OUT[0]], per_position=True)
    panel = found.plot(labels={"pos": list("abcdef")}).axes[0]
    assert [t.get_text() for t in panel.get_xticklabels()] == list("abcdef")
    with pytest.raises(HookGraphError, match="there are no effects to draw"):
        norm_maps({}, {})


@pytest.mark.parametrize("per_position", [False, True])
def test_samples_tell_how_much_their_mean_leaves_over(per_position: bool):
    graph, mask = bound("gpt2", torch.float64), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    data = {"input_ids": tokens() * mask, "attention_mask": mask}
    found = sample_activations(graph, [data], [MLP_OUT[1]], per_position=per_position)
    row = found.to_frame().iloc[0]
    values = graph.run(data, save=[MLP_OUT[1]])[MLP_OUT[1]]
    real = values[mask.bool()]
    assert row["norm"] == pytest.approx(float(real.square().sum(-1).mean().sqrt()))
    assert row["norm of the mean"] < row["norm"]
    assert row["samples"] == len(found.values[MLP_OUT[1]])
    assert f"drawn of {2 if per_position else 10}" in found._repr_html_()
    assert found.plot().axes


def test_a_steering_vector_tells_its_size_and_its_angle_to_others(tmp_path: Path):
    graph, pairs = bound("gpt2", torch.float64), [(tokens(1), tokens(1, seed=1))]
    stream, heads = (steering_vector(graph, pairs, x) for x in (RESID_POST[1], ATTN_Z[1]))
    there = [graph.run(x, save=[RESID_POST[1]])[RESID_POST[1]][0, -1].norm() for x in pairs[0]]
    assert stream.typical == pytest.approx(float(sum(there)) / 2)
    assert stream.cosine(stream) == pytest.approx(1)
    other = steering_vector(graph, [(b, a) for a, b in pairs], RESID_POST[1])
    assert stream.cosine(other) == pytest.approx(-1)
    with pytest.raises(HookGraphError, match="there is no angle between them"):
        stream.cosine(heads)
    stream.save(tmp_path / "v.safetensors")
    again = SteeringVector.load(tmp_path / "v.safetensors")
    assert repr(again) == repr(stream)
    assert f"({stream.norm / stream.typical:.0%} of what is there), 1 pair" in repr(again)
    assert heads.to_frame()["value"].tolist() == pytest.approx(heads.vector.flatten().tolist())
    assert stream.coordinates.top(1)[0].effect == pytest.approx(float(max(stream.vector, key=abs)))
    assert "<table" in stream._repr_html_()
    assert [t.get_text() for t in heads.plot().axes[0].get_xticklabels()] == ["0", "1", "2", "3"]
    assert stream.plot().axes[0].get_xlabel() == "d model"


def test_vectors_whose_size_was_not_kept_say_nothing_of_it():
    graph, ids = toy_graph(), toy_tokens()
    found = steering_vector(graph, [(ids, ids.flip(1))], ATTN_OUT[0])
    assert "of what is there" not in repr(SteeringVector(found.vector, found.location, 2))
