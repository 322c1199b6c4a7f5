# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false, reportUnknownLambdaType=false
"""`ConformanceReport`: what was proven of each location of a bound model, and why others are absent."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, final

from hookgraph.ontology.locations import Location

if TYPE_CHECKING:
    import pandas

INVARIANTS = (
    "fires once",
    "shape",
    "transparent",
    "conserved",
    "edit = gradient",
    "removed",
    "cached",
    "padded",
    "fused",
    "replayed",
    "narrowed",
    "shared",
)
"""What is checked of every location, or of some only: see the explanation page on conformance."""

OF_SOME = ("replayed", "narrowed", "shared")
"""Those that are of some locations only."""


@final
@dataclass(frozen=True, slots=True)
class Proof:
    """One invariant of one location: whether it holds, by how much it is off, within what tolerance."""

    location: Location
    invariant: str
    holds: bool
    error: float
    tolerance: float
    note: str = ""


@final
@dataclass(frozen=True, slots=True)
class Gap:
    """One invariant that could not be checked at a location, or not by one of its equations, and why."""

    location: Location
    invariant: str
    reason: str


@final
@dataclass(frozen=True, eq=False, repr=False)
class ConformanceReport:
    """Location x invariant, the mechanism that reaches each location, and reasons for what is absent."""

    proofs: tuple[Proof, ...] = ()
    mechanisms: Mapping[Location, str] = field(default_factory=dict[Location, str])
    absent: Mapping[Location, str] = field(default_factory=dict[Location, str])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    peers: Mapping[Location, Location] = field(default_factory=dict[Location, Location])
    """For a location that was not checked itself: the one, reached alike, whose proofs stand for it."""
    gaps: tuple[Gap, ...] = ()
    """What could not be checked: every location has a proof or a gap for each invariant."""

    @property
    def ok(self) -> bool:
        """Whether everything that was checked holds."""
        return not self.failures

    def proves(self, location: Location, invariant: str) -> bool:
        """Whether an invariant was checked at a location, or at the peer that stands for it, and holds."""
        return (self.peers.get(location, location), invariant) in self._held

    def why_unchecked(self, location: Location, invariant: str) -> str:
        """Why there is no proof of an invariant at a location, or at the peer that stands for it; empty if
        there is one, or a failure that came before it.
        """
        stand = self.peers.get(location, location)
        if any((p.location, p.invariant) == (stand, invariant) for p in self.proofs):
            return ""
        reasons = (g.reason for g in self.gaps if (g.location, g.invariant) == (stand, invariant))
        return next(reasons, "")

    @cached_property
    def _held(self) -> frozenset[tuple[Location, str]]:
        """What holds, to be looked up: passes ask for it, and there are thousands of proofs."""
        return frozenset((p.location, p.invariant) for p in self.proofs if p.holds)

    @property
    def failures(self) -> tuple[Proof, ...]:
        """What does not hold."""
        return tuple(p for p in self.proofs if not p.holds)

    def to_frame(self) -> "pandas.DataFrame":
        """One row per location: mechanism, and the error of each invariant (NaN where not checked)."""
        import pandas as pd

        rows = {str(k): {"mechanism": v} for k, v in self.mechanisms.items()}
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=["mechanism"])
        for invariant in INVARIANTS:
            errors = {str(p.location): p.error for p in self.proofs if p.invariant == invariant}
            frame[invariant] = pd.Series(errors, dtype=float)
        return frame

    def to_json(self) -> str:
        """Everything, as JSON."""
        content = {
            "metadata": dict(self.metadata),
            "ok": self.ok,
            "locations": {str(k): v for k, v in self.mechanisms.items()},
            "absent": {str(k): v for k, v in self.absent.items()},
            "peers": {str(k): str(v) for k, v in self.peers.items()},
            "unchecked": [
                {"location": str(g.location), "invariant": g.invariant, "reason": g.reason} for g in self.gaps
            ],
            "proofs": [
                {
                    "location": str(p.location),
                    "invariant": p.invariant,
                    "holds": p.holds,
                    "error": p.error if math.isfinite(p.error) else None,
                    "tolerance": p.tolerance,
                    "note": p.note,
                }
                for p in self.proofs
            ],
        }
        return json.dumps(content, indent=1)

    def __repr__(self) -> str:
        name = self.metadata.get("class", "model")
        checked = len({(p.location, p.invariant) for p in self.proofs})
        lines = [f"{name}: {len(self.mechanisms)} locations, {checked} invariants checked, "]
        lines[0] += "all hold" if self.ok else f"{len(self.failures)} fail"
        lines += [f"  {p.location}: {p.invariant} off by {p.error:.2g} {p.note}" for p in self.failures]
        if "proven on" in self.metadata:
            lines.append(f"  proven on {self.metadata['proven on']}")
        unchecked = Counter((g.invariant, g.reason) for g in self.gaps)
        lines += [f"  {name} not checked at {n}: {why}" for (name, why), n in unchecked.items()]
        lines += [f"  absent {location}: {reason}" for location, reason in self.absent.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(float_format=lambda x: f"{x:.1e}")
