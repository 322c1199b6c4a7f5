"""Results as tables, maps and one self-contained page. Nothing is computed here but how it looks."""

from hookgraph.report.attribution import Attribution, attribution_page
from hookgraph.report.figures import Picture, head_map, map_of, position_map
from hookgraph.report.page import Page, Section
from hookgraph.report.prompts import Prompt, PromptPair

__all__ = [
    "Attribution",
    "Page",
    "Picture",
    "Prompt",
    "PromptPair",
    "Section",
    "attribution_page",
    "head_map",
    "map_of",
    "position_map",
]
