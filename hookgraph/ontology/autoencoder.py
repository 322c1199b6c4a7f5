"""The locations that a dictionary brings into being at its site, in causal order."""

from typing import Final

from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import LocationType, reserve_declared

_LATENTS = (Dimension.BATCH, Dimension.POS, Dimension.LATENT)
_STREAM = (Dimension.BATCH, Dimension.POS, Dimension.D_MODEL)

LATENTS_PRE: Final = LocationType("latents_pre", _LATENTS, 10, layered=False)
"""Input of the dictionary's activation function."""
LATENTS: Final = LocationType("latents", _LATENTS, 20, layered=False)
"""f = enc(x), the activations of the dictionary's latents."""
RECONSTRUCTION: Final = LocationType("reconstruction", _STREAM, 30, layered=False)
"""x̂ = dec(f)."""
ERROR: Final = LocationType("error", _STREAM, 30, layered=False, joint=(Dimension.D_MODEL,))
"""e = x - x̂, computed from the unedited latents: one node per position."""
reserve_declared()
