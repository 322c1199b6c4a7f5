"""The rules of the source tree, each with a made-up tree that breaks it.

A rule is a pure function from a tree (path -> text) to the violations found in it. It is asserted
on the real tree, and on a tree that violates it: so every rule is known to be able to fail.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path, PurePosixPath

import pytest

Tree = Mapping[str, str]
Rule = Callable[[Tree], list[str]]

ROOT = Path(__file__).parents[1]
RANKS = {
    "checking": -1,  # switches the runtime checks on, before anything else is imported
    "errors": -1,
    "ontology": 0,
    "locations": 1,  # the standard locations, and the weights, in one place
    "weights": 1,
    "hooks": 1,
    "graph": 2,
    "binding": 3,
    "subgraphs": 4,
    "algorithms": 5,
    "report": 6,
    "demo": 6,
    "cli": 6,
    "": 6,  # hookgraph/__init__.py: the public names
    "__main__": 6,
}
CUT = {
    "subgraphs": {"hookgraph.binding", "transformers", "accelerate"},
    "algorithms": {"hookgraph.binding", "hookgraph.subgraphs", "transformers", "accelerate"},
}
BINDING_ROOMS = ("tracing", "data", "running", "resolving", "proving")
HUGGINGFACE_USERS = {"binding", "demo", "cli"}
OPTIONAL = {"matplotlib", "networkx", "pymoo", "scipy", "pandas"}
HUGGINGFACE_NAMES = re.compile(
    r"\b(?:self_attn|[qkvo]_proj|qkv_proj|c_attn|c_proj|c_fc|gate_proj|up_proj|down_proj"
    r"|query_key_value|input_layernorm|post_attention_layernorm|lm_head|embed_tokens|wte|wpe"
    r"|gpt_neox|model\.layers|model\.decoder|decoder\.layers|encoder\.layers|transformer\.h"
    r"|dense_h_to_4h|dense_4h_to_h)\b"
)
MAX_FILE_LINES = 400
MAX_BODY_LINES = 60


# --- reading a tree ---------------------------------------------------------------------------


@cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def part_of(module: str) -> str:
    """The ranked part a module belongs to: `graph` for hookgraph.graph.run, "" for hookgraph."""
    return [*module.split("."), ""][1]


@dataclass(frozen=True)
class Import:
    line: int
    target: str
    """The imported module: `a.b` for `from a import b` where that is a module of the tree."""

    def reaches(self, package: str) -> bool:
        return self.target == package or self.target.startswith(package + ".")

    @property
    def top(self) -> str:
        return self.target.split(".")[0]


def imports_of(path: str, tree: Tree, nodes: Iterator[ast.AST] | None = None) -> list[Import]:
    """Every import of a file, relative ones resolved, wherever in the file it stands."""
    modules = {module_of(other) for other in tree}
    package = module_of(path).split(".")
    if not path.endswith("/__init__.py"):
        package.pop()
    found = []
    for node in nodes or ast.walk(parsed(tree[path])):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            targets = [f"{base}.{alias.name}" for alias in node.names]
            found += [Import(node.lineno, t if t in modules else base) for t in targets]
    return found


def nodes_of(tree: Tree) -> Iterator[tuple[str, ast.AST]]:
    for path, text in tree.items():
        for node in ast.walk(parsed(text)):
            yield path, node


# --- the rules --------------------------------------------------------------------------------


def imports_go_down_the_ranks(tree: Tree) -> list[str]:
    found = []
    for path in tree:
        part = part_of(module_of(path))
        if part not in RANKS:
            found.append(f"{path}: {part!r} has no rank")
            continue
        for seen in imports_of(path, tree):
            if not seen.reaches("hookgraph"):
                continue
            target = part_of(seen.target)
            if RANKS.get(target, sys.maxsize) > RANKS[part]:
                found.append(f"{path}:{seen.line}: {part!r} imports {seen.target}, of higher rank")
    return found


def rooms_of_binding_follow_one_another(tree: Tree) -> list[str]:
    """A room imports those before it; what lies in no room comes after all of them."""
    order = {f"hookgraph.binding.{room}": i for i, room in enumerate(BINDING_ROOMS)}
    return [
        f"{path}:{seen.line}: {own.split('.')[-1]!r} imports {seen.target}, of a later room"
        for path in tree
        for own in [".".join(module_of(path).split(".")[:3])]
        if own in order
        for seen in imports_of(path, tree)
        if seen.reaches("hookgraph.binding")
        and order.get(".".join(seen.target.split(".")[:3]), len(order)) > order[own]
    ]


def ontology_needs_the_standard_library_only(tree: Tree) -> list[str]:
    return [
        f"{path}:{seen.line}: imports {seen.target}"
        for path in tree
        if part_of(module_of(path)) in ("ontology", "errors")
        for seen in imports_of(path, tree)
        if seen.top not in sys.stdlib_module_names and seen.top != "hookgraph"
    ]


def cut_edges_stay_cut(tree: Tree) -> list[str]:
    return [
        f"{path}:{seen.line}: imports {seen.target}"
        for path in tree
        for seen in imports_of(path, tree)
        for package in CUT.get(part_of(module_of(path)), ())
        if seen.reaches(package)
    ]


def huggingface_is_imported_where_models_are_bound(tree: Tree) -> list[str]:
    return [
        f"{path}:{seen.line}: imports {seen.target}"
        for path in tree
        if part_of(module_of(path)) not in HUGGINGFACE_USERS
        for seen in imports_of(path, tree)
        if seen.top in ("transformers", "accelerate")
    ]


def huggingface_names_stay_in_binding(tree: Tree) -> list[str]:
    return [
        f"{path}:{line}: {match.group()}"
        for path, text in tree.items()
        if part_of(module_of(path)) != "binding"
        for line, content in enumerate(text.splitlines(), 1)
        for match in HUGGINGFACE_NAMES.finditer(content)
    ]


def files_are_short(tree: Tree) -> list[str]:
    counts = {path: len(text.splitlines()) for path, text in tree.items()}
    return [f"{path}: {n} lines" for path, n in counts.items() if n > MAX_FILE_LINES]


def functions_are_short(tree: Tree) -> list[str]:
    found = []
    for path, node in nodes_of(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[ast.get_docstring(node) is not None :]
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            if lines > MAX_BODY_LINES:
                found.append(f"{path}:{node.lineno}: {node.name} has {lines} lines")
    return found


def annotations_are_evaluated(tree: Tree) -> list[str]:
    return [
        f"{path}:{node.lineno}: from __future__ import annotations"
        for path, node in nodes_of(tree)
        if isinstance(node, ast.ImportFrom)
        and node.module == "__future__"
        and any(alias.name == "annotations" for alias in node.names)
    ]


def nothing_is_asserted(tree: Tree) -> list[str]:
    return [
        f"{path}:{node.lineno}: assert"
        for path, node in nodes_of(tree)
        if isinstance(node, ast.Assert) and part_of(module_of(path)) != "demo"
    ]


def nothing_is_printed(tree: Tree) -> list[str]:
    return [
        f"{path}:{node.lineno}: print"
        for path, node in nodes_of(tree)
        if isinstance(node, ast.Name)
        and node.id == "print"
        and part_of(module_of(path)) not in ("cli", "report", "demo")
    ]


def modules_do_not_import_each_other(tree: Tree) -> list[str]:
    modules = {module_of(path) for path in tree}
    edges = {module_of(path): {seen.target for seen in imports_of(path, tree)} & modules for path in tree}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def imports_stand_at_the_top(tree: Tree) -> list[str]:
    found = []
    for path, text in tree.items():
        at_top = imports_of(path, tree, iter(parsed(text).body))
        found += [
            f"{path}:{seen.line}: imports {seen.target} late"
            for seen in imports_of(path, tree)
            if seen not in at_top and seen.top not in OPTIONAL
        ]
    return found


def no_module_is_a_drawer(tree: Tree) -> list[str]:
    drawers = {"util", "utils", "helpers", "misc"}
    return [path for path in tree if drawers & set(PurePosixPath(path).with_suffix("").parts)]


def axis_words_are_dimensions(tree: Tree) -> list[str]:
    words = dimensions_of(tree)
    if not words:
        return ["hookgraph/ontology/dimensions.py: no Dimension found"]
    return [
        f"{path}:{line}: {word!r} in {shape!r} is no Dimension"
        for path, text in tree.items()
        for line, shape in shapes_of(parsed(text))
        for word in shape.split()
        if not (word.removeprefix("#") in words or re.fullmatch(r"\d+|\.\.\.|\*\w+", word))
    ]


def dimensions_of(tree: Tree) -> set[str]:
    """The values of Dimension, read from its source."""
    text = tree.get("hookgraph/ontology/dimensions.py", "")
    return {
        entry.value.value
        for node in parsed(text).body
        if isinstance(node, ast.ClassDef) and node.name == "Dimension"
        for entry in node.body
        if isinstance(entry, ast.Assign)
        and isinstance(entry.value, ast.Constant)
        and isinstance(entry.value.value, str)
    }


def shapes_of(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Every jaxtyping shape of a module, those inside quoted annotations included."""
    dtypes = {
        alias.asname or alias.name
        for node in ast.walk(module)
        if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping"
        for alias in node.names
    }
    for line, node in unquoted_nodes(module):
        match node:
            case ast.Subscript(value=dtype, slice=ast.Tuple(elts=[_, shape])):
                name = ast.unparse(dtype)
                if name in dtypes or name.startswith("jaxtyping."):
                    literal = isinstance(shape, ast.Constant)
                    yield line, str(shape.value) if literal else ast.unparse(shape)
            case _:
                pass


def unquoted_nodes(module: ast.Module) -> Iterator[tuple[int, ast.AST]]:
    """Every node with its line; a string that is an expression counts as the expression too."""
    for node in ast.walk(module):
        line = getattr(node, "lineno", 0)
        yield line, node
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "[" in node.value:
            with suppress(SyntaxError):
                quoted = ast.parse(node.value.strip(), mode="eval")
                yield from ((line, inner) for inner in ast.walk(quoted))


# --- the real tree ----------------------------------------------------------------------------

RULES: tuple[Rule, ...] = (
    imports_go_down_the_ranks,
    rooms_of_binding_follow_one_another,
    ontology_needs_the_standard_library_only,
    cut_edges_stay_cut,
    huggingface_is_imported_where_models_are_bound,
    huggingface_names_stay_in_binding,
    files_are_short,
    functions_are_short,
    annotations_are_evaluated,
    nothing_is_asserted,
    nothing_is_printed,
    modules_do_not_import_each_other,
    imports_stand_at_the_top,
    no_module_is_a_drawer,
    axis_words_are_dimensions,
)


@pytest.fixture(scope="module")
def sources() -> Tree:
    """Every source file of hookgraph."""
    files = sorted((ROOT / "hookgraph").rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds_in_hookgraph(rule: Rule, sources: Tree):
    assert "hookgraph/ontology/dimensions.py" in sources
    violations = rule(sources)
    assert not violations, "\n".join(violations)


def test_shapes_are_checked_at_run_time_in_these_tests():
    spec = import_module("hookgraph.ontology.dimensions").__spec__
    assert spec is not None
    assert type(spec.loader).__module__.startswith("jaxtyping")


# --- made-up trees, so that every rule is seen to fail ----------------------------------------

DIMENSIONS = "class Dimension(StrEnum):\n    BATCH = 'batch'\n    POS = 'pos'\n"
INNOCENT: Tree = {
    "hookgraph/__init__.py": "from hookgraph.graph import Graph",
    "hookgraph/errors.py": "import difflib",
    "hookgraph/ontology/__init__.py": "",
    "hookgraph/ontology/dimensions.py": DIMENSIONS,
    "hookgraph/hooks/taps.py": "import torch\nfrom ..ontology import dimensions",
    "hookgraph/graph/__init__.py": "from hookgraph.graph.run import Graph",
    "hookgraph/graph/run.py": "from jaxtyping import Float\nfrom hookgraph.errors import E\n"
    "def f(x: Float[Tensor, '*rest #batch 3 ... pos'], y: Float[Tensor, '']): pass",
    "hookgraph/binding/names.py": "from transformers import AutoModel\nNAME = 'self_attn.q_proj'",
    "hookgraph/algorithms/metrics.py": "def table():\n    import pandas",
    "hookgraph/cli.py": "import hookgraph as hg\nimport accelerate\nprint('model')",
    "hookgraph/demo/train.py": "assert True",
}


@dataclass(frozen=True)
class Guilty:
    rule: Rule
    path: str
    text: str
    violation: str
    """What the rule has to say."""


GUILTY = (
    Guilty(
        imports_go_down_the_ranks,
        "hookgraph/hooks/taps.py",
        "from hookgraph.graph.run import Graph",
        "taps.py:1: 'hooks' imports hookgraph.graph.run",
    ),
    Guilty(
        imports_go_down_the_ranks,
        "hookgraph/errors.py",
        "from hookgraph import ontology",
        "errors.py:1: 'errors' imports hookgraph.ontology",
    ),
    Guilty(
        imports_go_down_the_ranks,
        "hookgraph/graph/run.py",
        "def late():\n    from ..binding import names",
        "run.py:2: 'graph' imports hookgraph.binding.names",
    ),
    Guilty(
        imports_go_down_the_ranks,
        "hookgraph/algorithms/metrics.py",
        "import hookgraph",
        "metrics.py:1: 'algorithms' imports hookgraph,",
    ),
    Guilty(imports_go_down_the_ranks, "hookgraph/extra.py", "", "'extra' has no rank"),
    Guilty(
        rooms_of_binding_follow_one_another,
        "hookgraph/binding/tracing/trace.py",
        "from hookgraph.binding.data.views import View",
        "trace.py:1: 'tracing' imports hookgraph.binding.data.views, of a later room",
    ),
    Guilty(
        rooms_of_binding_follow_one_another,
        "hookgraph/binding/proving/twins.py",
        "from hookgraph.binding import bind",
        "twins.py:1: 'proving' imports hookgraph.binding, of a later room",
    ),
    Guilty(
        ontology_needs_the_standard_library_only,
        "hookgraph/ontology/locations.py",
        "import re\nimport torch",
        "locations.py:2: imports torch",
    ),
    Guilty(
        cut_edges_stay_cut,
        "hookgraph/subgraphs/lens.py",
        "from hookgraph.binding.names import NAME",
        "lens.py:1: imports hookgraph.binding.names",
    ),
    Guilty(
        cut_edges_stay_cut,
        "hookgraph/subgraphs/lens.py",
        "import transformers.models",
        "lens.py:1: imports transformers.models",
    ),
    Guilty(
        cut_edges_stay_cut,
        "hookgraph/algorithms/flow.py",
        "from hookgraph.subgraphs import lens",
        "flow.py:1: imports hookgraph.subgraphs",
    ),
    Guilty(
        huggingface_is_imported_where_models_are_bound,
        "hookgraph/graph/run.py",
        "from transformers import PreTrainedModel",
        "run.py:1: imports transformers",
    ),
    Guilty(
        huggingface_names_stay_in_binding,
        "hookgraph/graph/run.py",
        '"""As in model.layers."""\n# self_attn\nx = "gpt_neox"',
        "run.py:2: self_attn",
    ),
    Guilty(
        huggingface_names_stay_in_binding,
        "hookgraph/demo/train.py",
        'x = "transformer.h.0"',
        "train.py:1: transformer.h",
    ),
    Guilty(files_are_short, "hookgraph/graph/run.py", "x = 1\n" * 401, "run.py: 401 lines"),
    Guilty(
        functions_are_short,
        "hookgraph/graph/run.py",
        'class A:\n    async def f(self):\n        """Doc."""\n' + "        x = 1\n" * 61,
        "run.py:2: f has 61 lines",
    ),
    Guilty(
        annotations_are_evaluated,
        "hookgraph/graph/run.py",
        "from __future__ import annotations",
        "run.py:1",
    ),
    Guilty(nothing_is_asserted, "hookgraph/graph/run.py", "assert True", "run.py:1: assert"),
    Guilty(nothing_is_printed, "hookgraph/graph/run.py", "print('hi')", "run.py:1: print"),
    Guilty(
        modules_do_not_import_each_other,
        "hookgraph/graph/run.py",
        "def late():\n    from hookgraph.graph import Graph",
        "hookgraph.graph.run <- hookgraph.graph",
    ),
    Guilty(
        imports_stand_at_the_top,
        "hookgraph/graph/run.py",
        "def late():\n    import json",
        "run.py:2: imports json late",
    ),
    Guilty(
        imports_stand_at_the_top,
        "hookgraph/graph/run.py",
        "if TYPE_CHECKING:\n    from hookgraph.errors import E",
        "run.py:2: imports hookgraph.errors late",
    ),
    Guilty(no_module_is_a_drawer, "hookgraph/graph/utils.py", "", "hookgraph/graph/utils.py"),
    Guilty(no_module_is_a_drawer, "hookgraph/utils/text.py", "", "hookgraph/utils/text.py"),
    Guilty(
        axis_words_are_dimensions,
        "hookgraph/graph/run.py",
        "from jaxtyping import Float as F\nX = 1\ndef f(x: F[Tensor, 'batch position']): pass",
        "run.py:3: 'position' in 'batch position' is no Dimension",
    ),
    Guilty(
        axis_words_are_dimensions,
        "hookgraph/graph/run.py",
        "from jaxtyping import Int\nInputs = \"Int[Tensor, 'batch seq'] | str\"",
        "run.py:2: 'seq'",
    ),
    Guilty(
        axis_words_are_dimensions,
        "hookgraph/graph/run.py",
        "import jaxtyping\nx: jaxtyping.Float[Tensor, SHAPE]",
        "run.py:2: 'SHAPE'",
    ),
    Guilty(
        axis_words_are_dimensions,
        "hookgraph/ontology/dimensions.py",
        "Dimension = str",
        "no Dimension found",
    ),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_is_silent_on_an_innocent_tree(rule: Rule):
    assert rule(INNOCENT) == []


@pytest.mark.parametrize("case", GUILTY, ids=lambda case: case.rule.__name__)
def test_rule_finds_the_violation(case: Guilty):
    violations = case.rule({**INNOCENT, case.path: case.text})
    assert any(case.violation in found for found in violations), violations


def test_every_rule_has_a_guilty_tree():
    assert {case.rule for case in GUILTY} == set(RULES)


# --- the tests themselves ---------------------------------------------------------------------


def unlisted_skips(tests: Tree, quarantine: str) -> list[str]:
    """Tests marked skip or xfail, in a decorator, that the quarantine does not name."""
    return [
        f"{path}::{node.name}"
        for path, node in nodes_of(tests)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and any(re.search(r"mark\.(skip|xfail)\b", ast.unparse(d)) for d in node.decorator_list)
        and f"{path}::{node.name}" not in quarantine
    ]


def test_skipped_tests_are_in_the_quarantine():
    folder = ROOT / "hookgraph_tests"
    tests = {
        file.relative_to(folder).as_posix(): file.read_text(encoding="utf-8")
        for file in folder.rglob("test_*.py")
    }
    assert unlisted_skips(tests, (folder / "QUARANTINE.md").read_text(encoding="utf-8")) == []


def test_an_unlisted_skip_is_found():
    text = "@pytest.mark.xfail\ndef test_a(): pass\n@mark.skipif(x)\ndef test_b(): pass"
    assert unlisted_skips({"test_x.py": text}, "None.") == ["test_x.py::test_a"]
    assert unlisted_skips({"test_x.py": text}, "`test_x.py::test_a`, flaky") == []
