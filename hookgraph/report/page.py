"""One HTML file that needs nothing else: no script, no link, no font; figures are inside it.

Everything that enters a page is escaped here: the pieces of a section are `Html`, and only the
functions of this module make one.
"""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NewType, final

from hookgraph.algorithms.ranking import Ranking
from hookgraph.report.breakdown import node_name
from hookgraph.report.figures import Picture
from hookgraph.report.prompts import Prompt, PromptPair
from hookgraph.report.styling import STYLE

Html = NewType("Html", str)
"""Markup in which every text is escaped."""


@final
@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it."""

    heading: str
    pieces: tuple[Html, ...]

    def render(self) -> Html:
        """The section as markup."""
        lines = [f"<h2>{escape(self.heading)}</h2>", *self.pieces]
        return Html("<section>\n" + "\n".join(lines) + "\n</section>")


@final
@dataclass(frozen=True, slots=True)
class Page:
    """A title, a line under it, and sections."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]

    def render(self) -> str:
        """The page as a complete HTML document."""
        title = escape(self.title)
        sections = "\n".join(s.render() for s in self.sections)
        return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="model">{escape(self.subtitle)}</p>
</header>
<main>
{sections}
</main>
<footer>Made with hookgraph.</footer>
</body>
</html>
"""

    def write(self, path: str | Path) -> Path:
        """Write the page to a file, and make the folder that it is to be in; returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.render(), encoding="utf-8")
        return path


def paragraph(text: str, *, css: str = "") -> Html:
    """Running text."""
    return Html(f'<p class="{escape(css)}">{escape(text)}</p>' if css else f"<p>{escape(text)}</p>")


def facts(pairs: Sequence[tuple[str, str]]) -> Html:
    """Names and values, as tiles."""
    tiles = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs)
    return Html(f'<dl class="facts">{tiles}</dl>')


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    """A plain table of texts."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return Html(f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>")


def verbatim(text: str) -> Html:
    """A text as it is, its columns aligned."""
    return Html(f"<div class=wide><pre>{escape(text)}</pre></div>")


def folded(summary: str, piece: Html) -> Html:
    """Something that is shown on demand."""
    return Html(f"<details><summary>{escape(summary)}</summary>{piece}</details>")


def picture(image: Picture, caption: str) -> Html:
    """A figure in the theme of the reader, inside the page."""
    light, dark = (f"data:image/png;base64,{b64encode(x).decode()}" for x in (image.light, image.dark))
    return Html(
        f'<figure><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{escape(image.alt)}" style="width:{image.width:.1f}in"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def ranking(nodes: Ranking, *, node: str = "node", tokens: Sequence[str] = ()) -> Html:
    """One row per node: estimate and exact effect as numbers and as bars on one scale."""
    measured = [x for n in nodes for x in (n.effect, n.exact) if x is not None]
    scale = max(map(abs, measured), default=1.0) or 1.0
    rows: list[str] = []
    for n in nodes:
        exact = "–" if n.exact is None else f"{n.exact:+.3f}"
        bars = _bar(n.effect / scale, "estimate") + (
            "" if n.exact is None else _bar(n.exact / scale, "exact")
        )
        name = escape(node_name(n.location, tokens))
        rows.append(
            f"<tr><td><code>{name}</code></td><td class=number>{n.effect:+.3f}</td>"
            f"<td class=number>{exact}</td><td class=bars>{bars}</td></tr>"
        )
    head = f"<th>{escape(node)}</th><th class=number>estimate</th><th class=number>exact</th>"
    legend = "<th class=legend><i class=estimate></i>estimate <i class=exact></i>exact</th>"
    body = "\n".join(rows)
    return Html(
        f"<div class=wide><table class=ranking><thead><tr>{head}{legend}</tr></thead>"
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def prompts(pair: PromptPair) -> Html:
    """Both prompts token by token, what differs marked, each with its answers."""
    return Html(_prompt("clean", pair, pair.clean) + _prompt("corrupt", pair, pair.corrupt))


def _prompt(name: str, pair: PromptPair, prompt: Prompt) -> str:
    tokens = "".join(
        f"<mark>{escape(token)}</mark>" if pair.differs(i) else f"<span>{escape(token)}</span>"
        for i, token in enumerate(prompt.tokens)
    )
    answers = "".join(
        f"<div class=answer><b>{escape(word)}</b><i style='width:{100 * p:.2f}%'></i><em>{p:.1%}</em></div>"
        for word, p in ((pair.answer, prompt.answer), (pair.wrong, prompt.wrong))
    )
    return (
        f"<div class=prompt><h3>{name}</h3><div class=tokens>{tokens}</div>"
        f"<div class=answers>{answers}</div></div>"
    )


def _bar(share: float, kind: str) -> str:
    """A bar from the middle of its cell, to the left if below 0."""
    side, sign = ("right", "negative") if share < 0 else ("left", "positive")
    return f'<i class="{kind} {sign}" style="{side}:50%;width:{50 * min(abs(share), 1):.2f}%"></i>'
