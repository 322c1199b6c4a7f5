"""The reference is complete: every module has its entry, and the table of locations is the vocabulary."""

import re
from pathlib import Path

import pytest

import hookgraph as hg
from hookgraph.errors import LocationError
from hookgraph.ontology import aliases, autoencoder, transformer
from hookgraph.ontology.locations import Location, LocationType

ROOT = Path(__file__).parents[1]
PAGES = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md")]
TABLE = (ROOT / "docs" / "reference" / "locations.md").read_text(encoding="utf-8")

CLI = ("algorithms", "arguments", "attribution", "circuits", "models", "pairs", "telling")
DOCUMENTED_OTHERWISE = {
    "hookgraph.__main__": "the page of the command line",
    **dict.fromkeys(
        (
            f"hookgraph.cli.{name}"
            for name in ("algorithms", "arguments", "attribution", "circuits", "models", "pairs", "telling")
        ),
        "the page of the command line",
    ),
    "hookgraph.locations": "the constants of hookgraph.ontology",
    "hookgraph.weights": "the constants of hookgraph.ontology.weights",
}


def modules() -> set[str]:
    """Every module of the package, packages left out."""
    files = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "hookgraph").rglob("*.py"))
    return {".".join(path.parts) for path in files if path.name != "__init__"}


def constants() -> dict[str, Location | LocationType]:
    """The vocabulary by the name of its constant, in the order of the modules."""
    places = {**vars(transformer.DECODER), **vars(autoencoder)}
    found = {name: x for name, x in places.items() if isinstance(x, Location | LocationType)}
    return {name: x() if isinstance(x, LocationType) and not x.layered else x for name, x in found.items()}


def rows() -> dict[str, list[str]]:
    """The cells of each row of the table, by constant."""
    lines = [line for line in TABLE.splitlines() if line.startswith("| `") and line.count("|") in (5, 7)]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {
        row[1].strip("`").removesuffix("[l]"): row
        for row in cells
        if row[1].strip("`").isupper() or "[l]" in row[1]
    }


def alias(translate, location):
    try:
        return translate(location)
    except LocationError:
        return None


def test_every_module_is_in_the_reference():
    listed = {name for page in PAGES for name in re.findall(r"^::: (\S+)", page, re.MULTILINE)}
    assert modules() - listed - set(DOCUMENTED_OTHERWISE) == set()


def test_the_table_lists_every_location_and_no_other():
    assert set(rows()) == set(constants())
    assert set(constants()) <= set(hg.locations.__all__)


@pytest.mark.parametrize("constant", constants())
def test_the_table_states_name_and_dimensions(constant: str):
    found = constants()[constant]
    kind = found if isinstance(found, LocationType) else found.type
    layer = "[l]" if kind.layered else ""
    assert rows()[constant][:3] == [f"`{kind.name}{layer}`", f"`{constant}{layer}`", " ".join(kind.dims)]


@pytest.mark.parametrize("constant", [c for c, cells in rows().items() if len(cells) == 6])
def test_the_table_states_the_names_in_other_tools(constant: str):
    found = constants()[constant]
    location = found[7] if isinstance(found, LocationType) else found
    lens = alias(aliases.to_transformer_lens, location)
    debugger = alias(aliases.to_transformer_debugger, location)
    *_, stated_lens, stated_debugger = rows()[constant]
    assert stated_lens.split(" (")[0].strip("`").replace(".l.", ".7.") == (lens or "–")
    if constant == "RESID_PRE":
        assert debugger == ("resid.post_mlp", 6)
        assert aliases.to_transformer_debugger(hg.locations.RESID_PRE[0]) == ("resid.post_emb", None)
        assert stated_debugger == "`resid.post_emb` (l = 0), else `resid.post_mlp` of l − 1"
    else:
        assert stated_debugger.strip("`") == (debugger[0] if debugger else "–")
