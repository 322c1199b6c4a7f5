"""The model's own end: the logits that follow from any residual put in the place of the last one."""

from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.streams import last_residual
from hookgraph.graph.abstract import Prepared
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.replay import can_start
from hookgraph.graph.run import Run
from hookgraph.hooks.editing import SetTo
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import LOGITS


def decoded(
    graph: HookGraph,
    inputs: Prepared,
    value: Float[Tensor, "batch pos d_model"],
    at: Location = LOGITS,
) -> Float[Tensor, "batch ..."]:
    """The logits, or the part that is named, with `value` in the place of the last residual.

    Norm, scale, unembedding and soft-cap are the model's; hooks of the graph do not apply. No layer is
    executed where a pass can start behind the last one. Differentiable in `value`, not in the weights.

    Raises:
        UnknownLocationError: the model has no stream.
    """
    bare, last = HookGraph(graph.binding), last_residual(graph)
    with graph.binding.frozen():
        if can_start(graph.binding, last):
            grad = value.requires_grad
            return bare.replay(Run({}, inputs=inputs), last, value=value, save=[at], grad=grad)[at]
        return bare.hook(last, SetTo(value)).run(inputs, save=[at], grad=value.requires_grad)[at]
