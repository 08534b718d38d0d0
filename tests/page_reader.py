"""Reading of pages as a browser would: elements, texts, scripts, figures."""

from __future__ import annotations

import base64
import gzip
import json
from html.parser import HTMLParser
from typing import Any


class Reader(HTMLParser):
    """A parser that collects a page's elements, texts and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.titles: list[str] = []  # heading above each figure
        self._open = self._head = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if dict(attrs).get("class") == "plot":
            self.titles.append(self._head)

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts.append((self.elements[-1][1], data))
        else:
            self.texts.append(data)
        if self._open in ("h2", "h3"):
            self._head = data

    @property
    def sections(self) -> list[str | None]:
        """Anchors of the sections."""
        return [attrs.get("id") for tag, attrs in self.elements if tag == "h2"]

    @property
    def text(self) -> str:
        """All that is shown."""
        return "\n".join(self.texts)

    def packed(self, id: str) -> str:
        """What the browser unpacks: `plotly` or `figures`."""
        (data,) = [text for attrs, text in self.scripts if attrs.get("id") == id]
        return gzip.decompress(base64.b64decode(data)).decode()

    @property
    def figures(self) -> list[dict[str, Any]]:
        """Plotly's figures, in the order of the page."""
        return json.loads(self.packed("figures"))

    def figure(self, title: str) -> dict[str, Any]:
        """The figure below a heading."""
        return self.figures[self.titles.index(title)]

    def lines(self, title: str) -> dict[str, tuple[list[Any], list[Any]]]:
        """{name: (x, y)} of the figure below a heading."""
        return {trace["name"]: (trace["x"], trace["y"]) for trace in self.figure(title)["data"]}
