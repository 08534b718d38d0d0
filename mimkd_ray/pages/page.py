"""The shell of every page: one HTML file with style, escaping and Plotly, which requests nothing from any server.

Plotly is in it once, compressed, and the browser unpacks it: 2 MB instead of 4.8. The content security policy names the
digests of the two scripts, so no other one runs, whatever a name in the data says.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from mimkd_ray.train.records.run_dir import jsonable


class Cell(NamedTuple):
    """A cell of a table."""

    text: str
    key: float | None = None
    """Sort key in a column of numbers; NaN puts the cell last, in either order."""
    long: bool = False
    """True for a cell that wraps and is wide enough for sentences."""
    link: str = ""
    """Address of another page."""


class Thumbnail(NamedTuple):
    """A small image with its caption."""

    data: bytes
    kind: str
    """png or jpeg."""
    lines: Sequence[tuple[str, str]]
    """(what, text) of each line of the caption."""


class Page:
    """A collection of sections that becomes the file. Every string passed in is text, never markup."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []
        self._sections: list[tuple[str, str]] = []
        self._figures: list[dict[str, Any]] = []

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
        self._parts.append(f"<div class=plots>{''.join(cells)}</div>")

    def table(self, heads: Sequence[str], rows: Sequence[Sequence[Cell]], sortable: bool = False) -> None:
        """Add a table, which scrolls inside its frame; if it is `sortable`, a click on a head sorts it."""
        numbers = [any(row[i].key is not None for row in rows) for i in range(len(heads))]
        texts = [f"<button>{html.escape(head)}</button>" if sortable else html.escape(head) for head in heads]
        head = "".join(
            f"<th scope=col{' class=number' if number else ''}>{text}</th>"
            for text, number in zip(texts, numbers, strict=True)
        )
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
        kind = " class=sortable" if sortable else ""
        self._parts.append(
            f"<div class=tall><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )

    def images(self, images: Sequence[Thumbnail]) -> None:
        """Add small images with captions."""
        cells = []
        for image in images:
            caption = "<br>".join(f"<span>{html.escape(a)}</span> {html.escape(b)}" for a, b in image.lines)
            data = base64.b64encode(image.data).decode()
            picture = f'<img alt="" src="data:image/{image.kind};base64,{data}">'
            cells.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
        self._parts.append(f"<div class=images>{''.join(cells)}</div>")

    def code(self, text: str, command: bool = False) -> None:
        """Add preformatted text; the lines of a `command` wrap."""
        self._parts.append(f"<pre{' class=command' if command else ''}>{html.escape(text)}</pre>")

    def json(self, summary: str, value: Any) -> None:
        """Add JSON that opens by a click on its summary."""
        text = html.escape(json.dumps(jsonable(value), indent=2))
        self._parts.append(f"<details><summary>{html.escape(summary)}</summary><pre>{text}</pre></details>")

    def html(self) -> str:
        """Return the whole file. The same page gives the same text."""
        title = html.escape(self.title)
        links = "".join(f'<a href="#{html.escape(id)}">{html.escape(text)}</a>' for id, text in self._sections)
        script, style = (files("mimkd_ray.pages").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("js", "css"))
        data, sources = "", [_digest(script)]
        if self._figures:
            plotly, digest = _plotly()
            data = f"{_data('plotly', plotly)}\n{_data('figures', _packed(json.dumps(self._figures)))}\n"
            sources.append(digest)
        policy = f"default-src 'none'; script-src {' '.join(sources)}; style-src 'unsafe-inline'; img-src data: blob:"
        return (
            "<!doctype html>\n"
            f'<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{style}</style>\n</head>\n"
            f"<body>\n<h1>{title}</h1>\n<nav>{links}</nav>\n{chr(10).join(self._parts)}\n"
            f"{data}<script>{script}</script>\n</body>\n</html>\n"
        )

    def _plot(self, figure: Any) -> str:
        # Through Plotly's own JSON, which knows numpy's arrays; its default template would be repeated in each figure.
        value = json.loads(figure.to_json())
        value["layout"].pop("template", None)
        self._figures.append(value)
        height = value["layout"].get("height", 450)
        return f'<div class=plot data-figure="{len(self._figures) - 1}" style="height:{height}px"></div>'


@cache
def _plotly() -> tuple[str, str]:
    """Return Plotly's script packed, and its digest."""
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    return _packed(script), _digest(script)


def _packed(text: str) -> str:
    """Return text as the base64 of its gzip form, without a time in it."""
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _data(id: str, packed: str) -> str:
    return f'<script type="text/plain" id="{id}">{packed}</script>'


def _cell(cell: Cell) -> str:
    if cell.link:
        return f'<td><a href="{html.escape(cell.link)}">{html.escape(cell.text)}</a></td>'
    if cell.long:
        return f"<td class=long>{html.escape(cell.text)}</td>"
    if cell.key is None:
        return f"<td>{html.escape(cell.text)}</td>"
    key = repr(float(cell.key)) if math.isfinite(cell.key) else ""
    return f'<td class=number data-key="{key}">{html.escape(cell.text)}</td>'
