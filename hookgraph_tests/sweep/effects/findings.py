"""What a check of an architecture came to."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, final

import torch
from torch import Tensor

from hookgraph.errors import HookGraphError
from hookgraph.ontology.locations import Location

Verdict: TypeAlias = Literal["ok", "wrong", "raised", "refused", "not applicable"]
"""`raised`: an error that is none of the library's; `refused`: one that is."""

Measure: TypeAlias = Callable[[Sequence[Location]], Tensor]
"""Nodes -> their effects, by node and example."""

TOLERANCE: Final = 1e-9
_LONGEST: Final = 200
_NODE: Final = re.compile(r"(\b[a-z_]+\.)*[a-z_]+(\[\d+\])?@[\w=:;,]*\w")


@final
@dataclass(frozen=True, slots=True)
class Finding:
    """One check.

    Args:
        check: its name.
        verdict: what it came to.
        detail: the figure and the node, or the reason.
        where: a node of which this is said.
        count: how many numbers were compared.
    """

    check: str
    verdict: Verdict
    detail: str = ""
    where: str = ""
    count: int = 0

    @property
    def failed(self) -> bool:
        """Whether a number is wrong, or an error says nothing."""
        return self.verdict in ("wrong", "raised")


def told(error: Exception) -> tuple[Verdict, str]:
    """What an error comes to."""
    words = _NODE.sub("this node", " ".join(str(error).split()))
    text = f"{type(error).__name__}: {words}"[:_LONGEST]
    return "refused" if isinstance(error, HookGraphError) else "raised", text


def tried(check: str, found: Iterator[Finding]) -> Iterator[Finding]:
    """What a check finds; an error that it does not expect is one more finding."""
    try:
        yield from found
    except Exception as error:
        yield Finding(check, *told(error))


def compared(
    check: str,
    nodes: Sequence[Location],
    measure: Measure,
    expected: Mapping[Location, Tensor],
    scale: Tensor,
    tolerance: float = TOLERANCE,
) -> Iterator[Finding]:
    """What is measured of nodes against what is right; where that is refused, kind by kind.

    Args:
        check: its name.
        nodes: what is measured.
        measure: how.
        expected: by node, one number per example.
        scale: how large the metric is, in each example.
        tolerance: how far a number may be off, as a share of the largest one.
    """  # fmt: skip
    if not nodes:
        return
    try:
        found = measure(nodes)
    except Exception as error:
        kinds = list(dict.fromkeys(node.type for node in nodes))
        if len(kinds) > 1:
            for kind in kinds:
                yield from compared(
                    check, [x for x in nodes if x.type == kind], measure, expected, scale, tolerance
                )
        else:
            verdict, reason = told(error)
            yield Finding(check, verdict, reason, str(nodes[0]), len(nodes))
        return
    right = torch.stack([expected[node] for node in nodes])
    size = torch.maximum(right.abs().max(), scale.abs().max()).clamp_min(1e-6)
    off = ((found - right).abs() / size).nan_to_num(torch.inf).reshape(len(nodes), -1).amax(1)
    worst = int(off.argmax())
    bad = int((off > tolerance).sum())
    figures = f"{found[worst].flatten().tolist()} is {right[worst].flatten().tolist()}"
    detail = (
        f"{bad} of {len(nodes)} nodes, such as {nodes[worst]}: {figures}"
        if bad
        else f"{float(off.max()):.0e}"
    )
    yield Finding(check, "wrong" if bad else "ok", detail, count=len(nodes))
