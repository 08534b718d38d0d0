"""Plotly figures of the pages. Colours of text, grid and background come from the page (page.js), light or dark.

The palette can be told apart on both, and by most colour-blind readers.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

BLUE, ORANGE, GREEN, PINK, RED, PURPLE, TEAL, GREY = PALETTE = (
    *("#3b82c4", "#d07a10", "#2a9566", "#c4619f"),
    *("#d4504c", "#8b74d6", "#1f9aa8", "#828b96"),
)
MOST_POINTS = 800
"""Most points of a line; more are thinned out evenly."""


class Line(NamedTuple):
    """One line of a figure."""

    name: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    color: str = BLUE
    dash: str = "solid"
    legend: bool = True
    """Whether the line has an entry in the legend."""
    right: bool = False
    """Whether its values are on the axis on the right."""


def plot_text(text: str) -> str:
    """Return text escaped for Plotly, which interprets a few HTML tags in its labels."""
    return html.escape(text, quote=False)


def cut(text: str, width: int) -> str:
    """Return text, shortened to `width` characters."""
    return text if len(text) <= width else text[: width - 1] + "…"


def on_lines(text: str, width: int) -> str:
    """Return text for Plotly on lines of about `width` characters, broken after a dot, an underscore or a space."""
    lines = [""]
    for part in re.findall(r"[^._ ]+[._ ]*|[._ ]+", text):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "<br>".join(cut(line, width) for line in lines)


def color_of(place: int) -> str:
    """Return the colour of a series by its place."""
    return PALETTE[place % len(PALETTE)]


def blank(x_title: str = "", y_title: str = "", height: int = 300) -> Any:
    """Return an empty figure with labelled axes, as wide as its place on the page; `height` in CSS pixels."""
    import plotly.graph_objects as go

    return go.Figure(
        layout={
            "height": height,
            "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
            "xaxis": {"title": {"text": x_title}},
            "yaxis": {"title": {"text": y_title}},
        }
    )


def lines_figure(
    lines: Sequence[Line],
    x_title: str,
    y_title: str,
    right_title: str = "",
    from_zero: bool = False,
    named: bool = False,
) -> Any:
    """Return a plot of lines. Points without a finite value are gaps. With `from_zero` the axis begins at 0; with
    `named` a single line is in the legend too."""
    figure = blank(x_title, y_title)
    if from_zero:
        figure.update_yaxes(rangemode="tozero")
    for line in lines:
        points = thinned([(x, y) for x, y in zip(line.x, line.y, strict=True) if x is not None])
        figure.add_scatter(
            x=[x for x, _ in points],
            y=[y if y is not None and math.isfinite(y) else None for _, y in points],
            mode="lines+markers" if len(points) < 12 and line.dash == "solid" else "lines",
            line={"color": line.color, "dash": line.dash, "width": 1.8},
            marker={"size": 5},
            name=plot_text(cut(line.name, 48)),
            hovertemplate="%{x:.4~g}: %{y:.4~g}",
            showlegend=line.legend and (named or len(lines) > 1),
            yaxis="y2" if line.right else "y",
        )
    if right_title:
        axis = {"title": {"text": right_title}, "overlaying": "y", "side": "right", "tickmode": "auto"}
        figure.update_layout(yaxis2={**axis, "rangemode": "tozero", "showgrid": False, "automargin": True})
    return figure


def thinned(points: Sequence[Any]) -> Sequence[Any]:
    """Return at most MOST_POINTS of the points, evenly, with the last one."""
    step = math.ceil(len(points) / MOST_POINTS)
    return points if step <= 1 else [*points[:-1:step], points[-1]]


def seeds_figure(groups: Mapping[str, Sequence[float]], x_title: str) -> Any:
    """Return a dot for every seed of each group, and a diamond at the group's mean; the first group on top."""
    figure = blank(x_title, "", 90 + 40 * len(groups))
    names = [plot_text(cut(name, 28)) for name in groups]
    dots = [(place, value) for place, values in enumerate(groups.values()) for value in values if math.isfinite(value)]
    means = {place: [value for at, value in dots if at == place] for place, _ in dots}
    for label, xs, ys, symbol, color in (
        ("one seed", [value for _, value in dots], [place for place, _ in dots], "circle-open", BLUE),
        ("mean", [math.fsum(v) / len(v) for v in means.values()], list(means), "diamond", ORANGE),
    ):
        figure.add_scatter(
            x=xs,
            y=ys,
            mode="markers",
            name=label,
            hovertext=[names[place] for place in ys],
            hovertemplate="%{hovertext}: %{x:.2f}",
            marker={"color": color, "symbol": symbol, "size": 9, "line": {"width": 2}},
        )
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=names, range=[len(names) - 0.5, -0.5])
    return figure


def bars_figure(names: Sequence[str], values: Sequence[float], x_title: str) -> Any:
    """Return horizontal bars, green where positive and red where negative; the first on top."""
    figure = blank(x_title, "", 70 + 15 * len(names))
    figure.add_bar(
        x=list(values),
        y=list(range(len(names))),
        orientation="h",
        marker={"color": [GREEN if value >= 0 else RED for value in values]},
        hovertext=[plot_text(cut(name, 60)) for name in names],
        hovertemplate="%{hovertext}: %{x:+.2f}<extra></extra>",
    )
    labels = [plot_text(cut(name, 24)) for name in names]
    figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=labels, autorange="reversed", tickfont={"size": 11}, showgrid=False
    )
    return figure


def reliability_figure(networks: Mapping[str, Sequence[Mapping[str, float]]], colors: Mapping[str, str]) -> Any:
    """Return accuracy against confidence, from the bins of each network's calibration, in its colour, and the diagonal
    of a perfectly calibrated one. The markers' areas tell of images."""
    figure = blank("probability of the answer", "share that is right", 340)
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": GREY, "dash": "dot"}, name="calibrated", hoverinfo="skip"
    )
    for name, all_bins in networks.items():
        bins = [each for each in all_bins if each["rows"]]
        most = max((each["rows"] for each in bins), default=1)
        figure.add_scatter(
            x=[each["confidence"] for each in bins],
            y=[each["accuracy"] for each in bins],
            mode="lines+markers",
            line={"color": colors[name], "width": 1.8},
            marker={"size": [6 + 16 * math.sqrt(each["rows"] / most) for each in bins], "opacity": 0.85},
            hovertext=[f"{each['rows']:,.0f} images" for each in bins],
            hovertemplate="%{hovertext}: said %{x:.3f}, right %{y:.3f}<extra></extra>",
            name=plot_text(cut(name, 48)),
        )
    figure.update_xaxes(range=[-0.02, 1.04])
    figure.update_yaxes(range=[-0.02, 1.06])
    return figure
