"""The page around the plots: one HTML file that requests nothing from any server, which its security policy
enforces."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""Content security policy: the page may run its own scripts and load nothing."""

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 0 20px 60px; background: #fff; color: #222;
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { margin: 24px 0 8px; font-size: 26px; line-height: 1.25; }
h2 { margin: 44px 0 4px; padding-top: 10px; border-top: 1px solid #ddd; font-size: 20px; }
h3 { margin: 14px 0 2px; font-size: 14px; overflow-wrap: anywhere; }
p { margin: 4px 0 10px; color: #555; max-width: 80ch; }
nav { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 10px 0; font-size: 14px; }
a { color: #0060a0; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 14px 0; }
.tile { min-width: 108px; padding: 8px 14px; border: 1px solid #ddd; border-radius: 6px; }
.tile b { display: block; font-size: 20px; line-height: 1.3; }
.tile span { color: #555; font-size: 13px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 12px 0; font-size: 14px; }
dt { color: #555; }
dd { margin: 0; overflow-wrap: anywhere; }
.slices { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 10px 24px; }
.slices > div { min-width: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px; border-bottom: 1px solid #e6e6e6; text-align: left; vertical-align: top; }
th { position: sticky; top: 0; background: #f5f5f5; white-space: nowrap; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid #0060a0; }
th[aria-sort=ascending] button::after { content: " \\25b2"; }
th[aria-sort=descending] button::after { content: " \\25bc"; }
td.number { text-align: right; white-space: nowrap; }
td.long { min-width: 260px; max-width: 520px; overflow-wrap: anywhere; }
.tall { width: fit-content; max-width: 100%; max-height: 640px; overflow: auto; border: 1px solid #e6e6e6; }
pre { margin: 8px 0; padding: 12px; max-height: 560px; overflow: auto; background: #f7f7f7; font-size: 12.5px;
  line-height: 1.4; }
@media (max-width: 600px) {
  body { padding: 0 12px 40px; }
  h1 { font-size: 22px; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 6px; }
}
"""

SCRIPT = """
document.querySelectorAll("table.sortable").forEach(table => {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.key ?? row.cells[column].textContent;
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // empty cells last, either way
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -order : order;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  }));
});
// A finger that drags over a plot scrolls the page.
if (matchMedia("(pointer: coarse)").matches)
  document.querySelectorAll(".js-plotly-plot").forEach(plot => Plotly.relayout(plot, {dragmode: false}));
"""


class Cell(NamedTuple):
    """A cell of a table."""

    text: str
    key: float | None = None
    """Sort key in a column of numbers; NaN puts the cell last, in either order."""
    long: bool = False
    """True for a cell that wraps and is wide enough for sentences."""


class Page:
    """A collection of sections that becomes the file. Every string passed in is text, never markup."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []
        self._sections: list[tuple[str, str]] = []
        self._figures = 0

    def section(self, id: str, heading: str, text: str = "") -> None:
        """Begin a section, with a sentence on how to read it."""
        self._sections.append((id, heading))
        self._parts.append(f'<h2 id="{html.escape(id)}">{html.escape(heading)}</h2>')
        if text:
            self.paragraph(text)

    def paragraph(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def tiles(self, tiles: Sequence[tuple[str, str]]) -> None:
        """Add boxes of (number, description)."""
        boxes = (f"<div class=tile><b>{html.escape(n)}</b><span>{html.escape(what)}</span></div>" for n, what in tiles)
        self._parts.append(f"<div class=tiles>{''.join(boxes)}</div>")

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Add a list of (name, value)."""
        rows = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts)
        self._parts.append(f"<dl>{''.join(rows)}</dl>")

    def figure(self, figure: Any, least_width: int = 0) -> None:
        """Add a Plotly figure, as wide as the page; it scrolls sideways if the page is narrower than `least_width`."""
        style = f' style="min-width:{least_width}px"' if least_width else ""
        self._parts.append(f"<div class=wide><div{style}>{self._plot(figure)}</div></div>")

    def figures(self, figures: Sequence[tuple[str, Any]]) -> None:
        """Add (title, Plotly figure) pairs, as many side by side as fit."""
        cells = (f"<div><h3>{html.escape(title)}</h3>{self._plot(figure)}</div>" for title, figure in figures)
        self._parts.append(f"<div class=slices>{''.join(cells)}</div>")

    def table(self, heads: Sequence[str], rows: Sequence[Sequence[Cell]], sortable: bool = False) -> None:
        """Add a table, which scrolls inside its frame; if it is `sortable`, a click on a head sorts it."""
        texts = [f"<button>{html.escape(head)}</button>" if sortable else html.escape(head) for head in heads]
        head = "".join(f"<th scope=col>{text}</th>" for text in texts)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
        kind = " class=sortable" if sortable else ""
        self._parts.append(
            f"<div class=tall><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )

    def code(self, text: str) -> None:
        """Add preformatted text."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def html(self) -> str:
        """Return the whole file."""
        from plotly.offline import get_plotlyjs

        title = html.escape(self.title)
        links = "".join(f'<a href="#{html.escape(id)}">{html.escape(text)}</a>' for id, text in self._sections)
        return (
            "<!doctype html>\n"
            f'<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{STYLE}</style>\n<script>{get_plotlyjs()}</script>\n</head>\n"
            f"<body>\n<h1>{title}</h1>\n<nav>{links}</nav>\n{chr(10).join(self._parts)}\n"
            f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
        )

    def _plot(self, figure: Any) -> str:
        self._figures += 1
        config = {"responsive": True, "displayModeBar": False}
        text: str = figure.to_html(
            full_html=False, include_plotlyjs=False, config=config, div_id=f"plot-{self._figures}"
        )
        return text


def _cell(cell: Cell) -> str:
    if cell.long:
        return f"<td class=long>{html.escape(cell.text)}</td>"
    if cell.key is None:
        return f"<td>{html.escape(cell.text)}</td>"
    key = repr(float(cell.key)) if math.isfinite(cell.key) else ""
    return f'<td class=number data-key="{key}">{html.escape(cell.text)}</td>'
