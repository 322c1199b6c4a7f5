"""Where the search for a direction starts."""

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms import reduction
from hookgraph.algorithms.bases.energies import Decode, States
from hookgraph.algorithms.readouts.lenses import Translation
from hookgraph.errors import UnknownLocationError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.weights import W_U

_AXES = 4
_SINGULAR = 4
_METRIC = 4


def starts(
    graph: HookGraph,
    states: States,
    decode: Decode,
    translation: Translation | None,
    k: int,
    seed: int,
) -> Float[Tensor, "... d_model"]:
    """Where a search may start: axes, singular vectors of the unembedding, directions of the local metric.

    The local metric is Σ g gᵀ, g the slope of the difference of the two largest logits. Its directions count
    on their own, and weighted by how far the states spread along them.

    Args:
        graph: the model.
        states: those of this process; all processes get the same starts.
        decode: states -> logits.
        translation: of the lens, if it has one.
        k: how many directions are sought.
        seed: of the axes.
    """
    rows = states.rows.double()
    width = rows.shape[1]
    chosen = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    eye = torch.eye(width, dtype=torch.float64, device=rows.device)
    # More axes than directions sought, so that the basis never spans every start.
    found = [eye[chosen[: k + _AXES].to(rows.device)]]
    try:
        table = graph.weight(W_U).detach().to(rows)
    except UnknownLocationError:
        table = rows.new_zeros(0, 0)
    if table.shape[0] == width:
        seen = table if translation is None else translation.linear(rows).mT @ table
        found.append(torch.linalg.eigh(seen @ seen.mT).eigenvectors[:, -_SINGULAR:].mT)
    value = states.value.detach().clone().requires_grad_()
    with torch.enable_grad():
        top = decode(value)[states.kept].topk(2, dim=-1).values
        (gradient,) = torch.autograd.grad((top[:, 0] - top[:, 1]).sum(), value)
    slopes = gradient.flatten(2)[states.kept].double()
    moments = torch.stack([slopes.mT @ slopes, rows.mT @ rows])
    metric, spread = reduction.summed(moments)
    for matrix in (metric, spread @ metric + metric @ spread):
        found.append(torch.linalg.eigh(matrix).eigenvectors[:, -_METRIC:].mT)
    return torch.cat(found)
