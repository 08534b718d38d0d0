"""Parallel coordinates: one line a trial, over an axis for each parameter and one for the score.

Drawn as lines instead of Plotly's own parallel coordinates, which need WebGL, show no hover text, and have no place for
a parameter that a trial did not have.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from mimkd_ray.search.report.axes import Scale, can_draw, value_of
from mimkd_ray.search.report.figures import BEST, GRID, INK, STYLES, blank
from mimkd_ray.search.report.wording import axis_label, cut, hover, plot_text, wrapped_name
from mimkd_ray.search.trials import Trial, ranked

MISSING = -0.13
"""Place, below the axis, where a line passes the axis of a parameter that its trial did not have."""

AXIS_WIDTH = 92
"""Least distance of two axes in CSS pixels, below which labels would collide; the page scrolls instead."""


def parallel_figure(trials: Sequence[Trial], metric: str, names: Sequence[str]) -> Any:
    """Return the figure over the parameters `names`, each of which some trial had. Dark lines are good trials."""
    from plotly.colors import sample_colorscale

    scores = [trial.score for trial in trials if can_draw(trial.score)]
    axes = [Scale.of([v for t in trials if (v := value_of(t, name)) is not None]) for name in names]
    score_axis = Scale.of(scores or [0.0], allow_log=metric != "top1")
    best_first = ranked(trials, metric)
    place_of = {trial.number: place for place, trial in enumerate(best_first)}

    opacity = min(0.6, max(0.2, 50 / len(trials)))
    figure = blank("", "", 480)
    # The best are drawn last, on top of the others; failed ones first.
    for trial in sorted(trials, key=lambda trial: place_of.get(trial.number, len(trials)), reverse=True):
        values = [value_of(trial, name) for name in names]
        y = [MISSING if v is None else axis.place(axis.number(v)) for axis, v in zip(axes, values, strict=True)]
        y.append(score_axis.place(trial.score) if can_draw(trial.score) else MISSING)
        usable, best = trial.number in place_of, place_of.get(trial.number) == 0
        goodness = 0.0 if y[-1] == MISSING else y[-1] if metric == "top1" else 1 - y[-1]
        # Viridis without its pale end, which is hardly visible on a white page.
        color = sample_colorscale("Viridis", [0.9 * (1 - goodness)])[0] if usable else STYLES[trial.state].color
        figure.add_scatter(
            x=list(range(len(y))),
            y=y,
            mode="lines+markers",
            line={"color": BEST if best else color, "width": 4 if best else 1.4, "dash": "solid" if usable else "dash"},
            marker={"size": 4},
            opacity=1 if best else opacity,
            hovertext=hover(trial, metric),
            hoverinfo="text",
            showlegend=False,
        )
    for place, axis in enumerate([*axes, score_axis]):
        figure.add_shape(type="line", x0=place, x1=place, y0=0, y1=1, line={"color": INK, "width": 1}, layer="below")
        if place < len(axes) or scores:
            for tick in axis.ticks:
                _label(figure, place, axis.place(tick), cut(axis.label(tick), 13))
    missing = any(value_of(trial, name) is None for trial in trials for name in names)
    if missing or len(scores) < len(trials):
        figure.add_shape(
            type="line", x0=0, x1=len(axes), y0=MISSING, y1=MISSING, line={"color": GRID, "width": 6}, layer="below"
        )
        _label(figure, 0, MISSING, "none")
    titles = [wrapped_name(name, 14) for name in names]
    titles.append("<br>".join(textwrap.wrap(axis_label(metric), 14)))
    figure.update_xaxes(
        tickvals=list(range(len(titles))),
        ticktext=titles,
        tickangle=0,
        side="top",
        range=[-0.45, len(axes) + 0.45],
        ticklabeloverflow="allow",
        showgrid=False,
    )
    figure.update_yaxes(visible=False, range=[MISSING - 0.06, 1.05])
    return figure


def _label(figure: Any, x: float, y: float, text: str) -> None:
    """Write the text of a tick left of its axis, legible over lines."""
    figure.add_annotation(
        x=x,
        y=y,
        text=plot_text(text),
        showarrow=False,
        xanchor="right",
        xshift=-3,
        font={"size": 11},
        bgcolor="rgba(255,255,255,0.75)",
        borderpad=0,
    )
