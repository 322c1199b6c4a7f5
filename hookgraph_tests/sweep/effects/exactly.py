"""Exact patching against one plain pass per node."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hookgraph.algorithms.effects.exact import exact_effects
from hookgraph.algorithms.effects.patching import patching_effect
from hookgraph.errors import HookGraphError
from hookgraph.graph.measuring import Metric
from hookgraph.graph.run import Run
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location
from hookgraph_tests.sweep.effects.brute import logits_with, module_at, outputs_of, patched_logits
from hookgraph_tests.sweep.effects.findings import Finding, compared, told
from hookgraph_tests.sweep.effects.trials import Trial, metrics

_ONE_READER = ("resid.post", "attn.out", "mlp.out", "mixer.out", "xattn.out")
"""Locations that are all of what a module hands on."""
_FEW = 12
_ROWS = 5
"""Rows at once, where that is to divide nodes into several passes."""


def exact(trial: Trial, nodes: Sequence[Location], corrupt: Run) -> Iterator[Finding]:
    """All nodes in one call, the late ones, few rows at a time; by metrics of several kinds."""
    graph, clean = trial.graph, trial.clean
    base = graph.run(clean).logits
    patched = patched_logits(graph, clean, corrupt, nodes)
    late = [node for node in nodes if dict(node.index).get(Dimension.POS, 0) > 0]
    last = [node for node in late if dict(node.index)[Dimension.POS] == max(_positions(late))]
    for name, metric in metrics(base, len(next(iter(corrupt.values())))).items():
        plain = metric(base)
        expected = {node: metric(patched[node]) - plain for node in nodes}

        def measure(these: Sequence[Location], rows: int = 256, metric: Metric = metric) -> Tensor:
            return exact_effects(graph, clean, trial.corrupt, metric, these, batch_size=rows, progress=False)

        yield from compared(f"exact/{name}", nodes, measure, expected, plain)
        if name == "all":
            yield from _raw(trial, corrupt, nodes, expected, metric)
            continue
        yield from compared(f"late/{name}", late, measure, expected, plain)
        yield from compared(f"last/{name}", last, measure, expected, plain)
        few = nodes[:: max(1, len(nodes) // _FEW)]
        yield from compared(f"few rows/{name}", few, lambda x: measure(x, _ROWS), expected, plain)


def whole(trial: Trial, places: Sequence[Location], corrupt: Run) -> Iterator[Finding]:
    """Every node of whole locations, by `patching_effect`, a head or a neuron being a node."""
    graph = trial.graph
    base = graph.run(trial.clean).logits
    name, metric = [*metrics(base, len(next(iter(corrupt.values())))).items()][-1]
    plain = metric(base)
    for place in places:
        try:
            joint = ("d_model", "d_head", "d_mlp", "d_mixer", "key_pos", "vocab")
            found = patching_effect(
                graph,
                trial.clean,
                trial.corrupt,
                metric,
                [place],
                method="exact",
                joint=joint,
                progress=False,
            )
        except Exception as error:
            yield Finding(f"whole/{name}", *told(error))
            continue
        shape, dims = found.effects[place].shape, found.dims(place)
        points = torch.ones(shape[1:]).nonzero().tolist()
        nodes = [place.at(**dict(zip(map(str, dims[1:]), point, strict=True))) for point in points]
        patched = patched_logits(graph, trial.clean, corrupt, nodes)
        expected = {node: metric(patched[node]) - plain for node in nodes}
        effects = found.effects[place].reshape(shape[0], -1).T
        yield from compared(f"whole/{name}", nodes, lambda _: effects, expected, plain)  # noqa: B023


def _raw(
    trial: Trial, corrupt: Run, nodes: Sequence[Location], expected: Mapping[Location, Tensor], metric: Metric
) -> Iterator[Finding]:
    """What is right, once more: by PyTorch's hooks, at locations that are what a module returns."""
    inputs = trial.graph.binding.prepare(trial.clean)
    try:
        outputs = outputs_of(trial.model, inputs)
        clean = trial.graph.run(trial.clean, save=list(dict.fromkeys(node.whole for node in nodes)))
    except HookGraphError:
        return
    paths = {x: path for x in clean if (path := module_at(outputs, clean[x])) is not None}
    found = [node for node in nodes if node.whole in paths and node.type.name in _ONE_READER]

    def measure(these: Sequence[Location]) -> Tensor:
        logits = [logits_with(trial.model, inputs, paths[x.whole], x, corrupt[x]) for x in these]
        return torch.stack([metric(x) for x in logits]) - metric(trial.graph.run(trial.clean).logits)

    scale = metric(trial.graph.run(trial.clean).logits)
    yield from compared("modules", found, measure, expected, scale)


def _positions(nodes: Sequence[Location]) -> list[int]:
    return [dict(node.index)[Dimension.POS] for node in nodes]
