"""How a page looks: one style sheet, for light and dark surroundings."""

from typing import Final

STYLE: Final = """
:root {
  --surface: #ffffff; --raised: #f6f7f9; --ink: #1b1f24; --muted: #5f6875; --line: #dfe3e8;
  --negative: #0b4a8f; --positive: #a83c05; --negative-soft: #9dc3ea; --positive-soft: #f6bd8a;
  --mark: #fdeccf; --mark-ink: #6b3a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --surface: #161a20; --raised: #1e232b; --ink: #e6e8eb; --muted: #969eaa; --line: #303741;
    --negative: #7fbcff; --positive: #ffb070; --negative-soft: #2a588f; --positive-soft: #8a4a1c;
    --mark: #4a3410; --mark-ink: #ffd89a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem;
  background: var(--surface); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.015em; }
h2 { margin: 3rem 0 0.6rem; font-size: 1.25rem; letter-spacing: -0.01em; }
h3 { margin: 0; font-size: 0.8rem; font-weight: 600; color: var(--muted); }
p { margin: 0.5rem 0 1rem; max-width: 46rem; }
.model, footer, figcaption, .note { color: var(--muted); }
.model { margin-top: 0.5rem; }
.note, figcaption, footer { font-size: 0.9rem; }
footer { margin-top: 4rem; border-top: 1px solid var(--line); padding-top: 1rem; }
code, .tokens, .said { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code, .said { font-size: 0.88em; }
.said { background: var(--raised); padding: 0.6rem 0.8rem; border-radius: 6px; }
.facts { display: flex; flex-wrap: wrap; gap: 0.75rem; margin: 1rem 0; }
.facts div {
  flex: 1 1 9rem; background: var(--raised); border-radius: 8px; padding: 0.7rem 0.9rem;
}
.facts dt { font-size: 0.82rem; color: var(--muted); }
.facts dd { margin: 0.1rem 0 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; }
th, td { text-align: left; padding: 0.35rem 1rem 0.35rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--muted); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bars { position: relative; width: 45%; min-width: 12rem; padding: 0; }
.bars::before {
  content: ""; position: absolute; left: 50%; top: 0; bottom: 0; width: 1px; background: var(--line);
}
.bars i { position: absolute; height: 7px; border-radius: 2px; }
.bars .estimate { top: calc(50% - 8px); }
.bars .exact { top: calc(50% + 1px); }
.estimate.negative { background: var(--negative-soft); }
.estimate.positive { background: var(--positive-soft); }
.exact.negative { background: var(--negative); }
.exact.positive { background: var(--positive); }
.legend { text-align: center; font-weight: 400; font-size: 0.82rem; }
.legend i {
  display: inline-block; width: 1.2em; height: 7px; margin: 0 0.3em 0.1em 0.8em; border-radius: 2px;
}
.legend .estimate { background: linear-gradient(90deg, var(--negative-soft) 50%, var(--positive-soft) 50%); }
.legend .exact { background: linear-gradient(90deg, var(--negative) 50%, var(--positive) 50%); }
.prompt { background: var(--raised); border-radius: 8px; padding: 0.8rem 1rem; margin: 0.75rem 0; }
.tokens { font-size: 0.88rem; line-height: 2; margin: 0.3rem 0; }
.tokens span, .tokens mark {
  padding: 0.1rem 0.3rem; margin-right: 0.2rem; border-radius: 4px; white-space: pre-wrap;
}
.tokens span { background: var(--surface); }
.tokens mark { background: var(--mark); color: var(--mark-ink); font-weight: 600; }
.answer { display: grid; grid-template-columns: 6rem 1fr 4rem; align-items: center; font-size: 0.92rem; }
.answer i { height: 9px; min-width: 2px; border-radius: 2px; background: var(--muted); }
.answer em { font-style: normal; text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { max-width: 46rem; margin-top: 0.3rem; }
details { margin: 0.75rem 0; }
summary { cursor: pointer; color: var(--muted); }
@media print { body { max-width: none; } details { display: none; } }
"""
