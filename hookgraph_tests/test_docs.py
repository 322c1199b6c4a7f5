"""Every Python block of the README and the docs is executed, in order, one namespace per file.

`<!-- setup: code -->` runs code that the page does not show. `<!-- no-exec: reason -->` right
before a block leaves it out: for what needs a network, a GPU or minutes.
"""

import re
import sys
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
MAX_UNEXECUTED = 5

PIECE = re.compile(
    r"^[ \t]*<!--\s*(?P<kind>setup|no-exec)\b:?(?P<body>.*?)-->"
    r"|^[ \t]*(?P<fence>`{3,}|~{3,})(?P<info>[^\n]*)\n(?P<code>.*?)^[ \t]*(?P=fence)[ \t]*$",
    re.DOTALL | re.MULTILINE,
)
PYTHON = re.compile(r"[ \t]*\{?[ \t]*\.?(python|py)\d?\b", re.IGNORECASE)


@dataclass(frozen=True)
class Block:
    line: int
    """Where its code starts in the page."""
    code: str
    reason: str | None = None
    """Why it is not executed, where it is not."""


def blocks_of(text: str) -> list[Block]:
    """The Python blocks and setup comments of a page, in order.

    Raises:
        ValueError: a no-exec comment without a reason, or with no Python block right after it.
    """
    blocks: list[Block] = []
    pending: re.Match[str] | None = None
    for piece in [*PIECE.finditer(text), None]:
        if pending is not None:
            reason, line = pending["body"].strip(), text.count("\n", 0, pending.end()) + 1
            if not reason:
                raise ValueError(f"line {line}: no-exec needs a reason")
            gap = text[pending.end() : piece.start() if piece else None]
            if piece is None or not PYTHON.match(piece["info"] or "") or gap.strip():
                raise ValueError(f"line {line}: no-exec needs a Python block right after it")
            blocks.append(python_block(piece, text, reason))
            pending = None
        elif piece is None:
            break
        elif piece["kind"] == "no-exec":
            pending = piece
        elif piece["kind"] == "setup":
            start = piece.start("body") + len(piece["body"]) - len(piece["body"].lstrip())
            blocks.append(Block(text.count("\n", 0, start) + 1, cleandoc(piece["body"])))
        elif PYTHON.match(piece["info"]):
            blocks.append(python_block(piece, text))
    return blocks


def python_block(piece: re.Match[str], text: str, reason: str | None = None) -> Block:
    """The block of a fence, with the line of its first code line."""
    return Block(text.count("\n", 0, piece.start("code")) + 1, dedent(piece["code"]), reason)


def execute(page: str, blocks: list[Block], module: ModuleType) -> None:
    """Run the blocks in the module's namespace; a traceback points into the page."""
    for block in blocks:
        if block.reason is None:
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, page, "exec", dont_inherit=True), module.__dict__)


PAGES = {
    page.relative_to(ROOT).as_posix(): blocks_of(page.read_text(encoding="utf-8"))
    for page in [*ROOT.glob("README.md"), *sorted((ROOT / "docs").rglob("*.md"))]
}


@pytest.fixture
def page_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module for the page's names, where dataclasses and pickle can look them up."""
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    return module


@pytest.mark.parametrize("page", [page for page, blocks in PAGES.items() if blocks])
def test_page_runs(
    page: str,
    page_module: ModuleType,
    kept_bindings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOOKGRAPH_CACHE", str(kept_bindings))
    execute(str(ROOT / page), PAGES[page], page_module)


def test_few_blocks_are_not_executed():
    left_out = [
        f"{page}:{block.line}: {block.reason}"
        for page, blocks in PAGES.items()
        for block in blocks
        if block.reason is not None
    ]
    assert len(left_out) <= MAX_UNEXECUTED, "\n".join(left_out)


# --- the collector itself ---------------------------------------------------------------------

PAGE = """\
<!-- setup:
import math
root = math.sqrt
-->
```python
x = root(4)
```
Text, and a block that is not ours:
```bash
python -c 'x = 100'
```
=== "a tab"
    ```python title="step.py"
    if x:
        x += 1
    ```

<!-- no-exec: needs a GPU -->
```py
x = 100
```
"""


def test_blocks_are_collected_in_order():
    blocks = blocks_of(PAGE)
    assert [block.line for block in blocks] == [2, 6, 14, 20]
    assert [block.reason for block in blocks] == [None, None, None, "needs a GPU"]
    assert blocks[2].code == "if x:\n    x += 1\n"


def test_blocks_share_one_namespace(page_module: ModuleType):
    execute("page.md", blocks_of(PAGE), page_module)
    assert page_module.__dict__["x"] == 3


def test_a_broken_block_fails_at_its_line_of_the_page(page_module: ModuleType):
    with pytest.raises(ZeroDivisionError) as caught:
        execute("page.md", blocks_of(PAGE + "```python\n\n1 / 0\n```\n"), page_module)
    last = caught.traceback[-1]
    assert (str(last.path).endswith("page.md"), last.lineno + 1) == (True, 24)


@pytest.mark.parametrize("comment", ["<!-- no-exec -->", "<!-- no-exec: -->"])
def test_leaving_a_block_out_needs_a_reason(comment: str):
    with pytest.raises(ValueError, match="line 1: no-exec needs a reason"):
        blocks_of(f"{comment}\n```python\nx\n```\n")


@pytest.mark.parametrize("between", ["", "words\n```python\nx\n```\n", "```bash\nx\n```\n"])
def test_a_reason_needs_a_block(between: str):
    with pytest.raises(ValueError, match="line 1: no-exec needs a Python block"):
        blocks_of(f"<!-- no-exec: slow -->\n{between}")
