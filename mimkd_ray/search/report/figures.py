"""The plots of a search's report, as Plotly figures. The page has their titles, because Plotly does not wrap titles.

Marker and colour show a trial's state, the same in every plot; the colours are Okabe and Ito's, which colour-blind
readers can distinguish. Trials that failed before they had a score lie on the lower edge of plots of the score.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from mimkd_ray.search.report.axes import FEW, Scale, can_draw, spans_decades, value_of
from mimkd_ray.search.report.importance import Importance
from mimkd_ray.search.report.wording import axis_label, cut, hover, plot_lines, plot_text, score_text, wrapped_name
from mimkd_ray.search.trials import Final, Point, Trial, ranked


class Style(NamedTuple):
    """Marker and line of the trials of one state."""

    color: str
    symbol: str
    dash: str


STYLES = {
    "completed": Style("#0072B2", "circle", "solid"),
    "stopped": Style("#E69F00", "triangle-down", "solid"),
    "failed": Style("#D55E00", "x", "dash"),
    "running": Style("#666666", "circle-open", "dot"),
}
INK, GRID, BEST, CONDITIONAL = "#222222", "#E6E6E6", "#009E73", "#CC79A7"


def blank(x_title: str, y_title: str, height: int) -> Any:
    """Return an empty figure with labelled axes, as wide as its place on the page; `height` in CSS pixels."""
    import plotly.graph_objects as go

    axis = {"gridcolor": GRID, "linecolor": GRID, "zeroline": False, "automargin": True, "title_standoff": 8}
    title = {"size": 13}
    return go.Figure(
        layout={
            "template": "none",
            "height": height,
            "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "hovermode": "closest",
            "hoverlabel": {"align": "left", "bgcolor": "white", "font": {"color": INK, "size": 12}},
            "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.01, "x": 0, "itemsizing": "constant"},
            "xaxis": {"title": {"text": x_title, "font": title}, **axis},
            "yaxis": {"title": {"text": y_title, "font": title}, **axis},
        }
    )


def objective_figure(trials: Sequence[Trial], metric: str) -> Any:
    """Return the plot of the score by trial number, with the best so far."""
    figure = blank("trial number, in the order of their start", axis_label(metric), 420)
    best: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: trial.number):
        if can_draw(trial.score) and any(leader is trial for leader in ranked([*best[-1:], trial], metric)[:1]):
            best.append(trial)
    if best:
        last = max(trial.number for trial in trials)
        figure.add_scatter(
            x=[*(trial.number for trial in best), last],
            y=[*(trial.score for trial in best), best[-1].score],
            mode="lines",
            line={"shape": "hv", "color": BEST, "width": 2},
            name="best so far",
            hoverinfo="skip",
        )
    _add_scores(figure, trials, metric, {trial.number: trial.number for trial in trials}, trials)
    return figure


def slice_figure(trials: Sequence[Trial], metric: str, name: str) -> Any:
    """Return the plot of one parameter against the score: the trials that have it, and a bar at the median of each
    category."""
    have = [(trial, value) for trial in trials if (value := value_of(trial, name)) is not None]
    scale = Scale.of([value for _, value in have])
    x = {trial.number: scale.number(value) for trial, value in have}
    figure = blank(plot_text(cut(name, 48)), axis_label(metric), 300)
    figure.update_layout(showlegend=False)
    if scale.categories:
        _add_medians(figure, [(x[trial.number], trial.score) for trial, _ in have if can_draw(trial.score)], metric)
        # Spread sideways, always to the same place: the golden section spreads any run of numbers evenly.
        x = {number: at + ((number * 0.618034) % 1 - 0.5) * 0.5 for number, at in x.items()}
        figure.update_xaxes(range=[-0.6, scale.high + 0.6], showgrid=False)
    if scale.categories or (len(scale.ticks) <= FEW and set(scale.ticks) == set(x.values())):
        labels = [plot_text(cut(scale.label(tick), 24)) for tick in scale.ticks]
        figure.update_xaxes(tickvals=list(scale.ticks), ticktext=labels)
    if scale.log:
        figure.update_xaxes(type="log")
    _add_scores(figure, [trial for trial, _ in have], metric, x, trials)
    return figure


def importance_figure(found: Sequence[Importance]) -> Any:
    """Return the bars of importances, the largest on top."""
    figure = blank("share of variance (%)", "", 90 + 30 * len(found))
    for everywhere, label, color in (
        (True, "in every trial", STYLES["completed"].color),
        (False, "in some trials", CONDITIONAL),
    ):
        group = [(place, item) for place, item in enumerate(found) if item.everywhere == everywhere]
        figure.add_bar(
            x=[100 * item.share for _, item in group],
            y=[place for place, _ in group],
            orientation="h",
            name=label,
            marker={"color": color},
            text=[f"{100 * item.share:.0f} %" for _, item in group],
            textposition="outside",
            cliponaxis=False,
            hovertext=[
                plot_lines(
                    [cut(item.name, 60), f"{100 * item.share:.1f} %, from the {item.trials} trials that have it"]
                )
                for _, item in group
            ],
            hoverinfo="text",
            showlegend=bool(group),
        )
    names = [wrapped_name(item.name, 24) for item in found]
    figure.update_yaxes(tickvals=list(range(len(found))), ticktext=names, autorange="reversed", showgrid=False)
    figure.update_xaxes(range=[0, 115 * max(item.share for item in found)])
    return figure


def curves_figure(trials: Sequence[Trial], metric: str) -> Any:
    """Return the plot of the metric by epoch, one line a trial, with a marker where it ended; the best trial on top."""
    figure = blank("epoch", axis_label(metric), 460)
    best = next(iter(ranked(trials, metric)), None)
    for state, style in STYLES.items():
        lines = [(trial, _points(trial, metric)) for trial in trials if trial.state == state]
        lines = [(trial, points) for trial, points in lines if points]
        # One trace for all, with a gap after each trial: hundreds of traces would make the page slow.
        whole = [(trial, point) for trial, points in lines for point in [*points, None]]
        figure.add_scatter(
            x=[point and point.epoch for _, point in whole],
            y=[point and getattr(point, metric) for _, point in whole],
            hovertext=[
                point and f"trial {trial.number}, epoch {point.epoch}<br>{score_text(getattr(point, metric), metric)}"
                for trial, point in whole
            ],
            hoverinfo="text",
            mode="lines",
            line={"color": style.color, "width": 1.3, "dash": style.dash},
            opacity=0.65,
            legendgroup=state,
            showlegend=False,
        )
        figure.add_scatter(
            x=[points[-1].epoch for _, points in lines],
            y=[getattr(points[-1], metric) for _, points in lines],
            hovertext=[hover(trial, metric, f"last evaluated at epoch {points[-1].epoch}") for trial, points in lines],
            hoverinfo="text",
            mode="markers",
            marker={"color": style.color, "symbol": style.symbol, "size": 8},
            name=state,
            legendgroup=state,
            showlegend=bool(lines),
        )
    if best is not None and (points := _points(best, metric)):
        figure.add_scatter(
            x=[point.epoch for point in points],
            y=[getattr(point, metric) for point in points],
            mode="lines",
            line={"color": BEST, "width": 3},
            name=f"best: trial {best.number}",
            hoverinfo="skip",
        )
    numbers = [getattr(point, metric) for trial in trials for point in _points(trial, metric)]
    if metric != "top1" and spans_decades(numbers):
        figure.update_yaxes(type="log")
    figure.update_xaxes(rangemode="tozero")
    return figure


def information_figure(trials: Sequence[Trial], metric: str) -> Any | None:
    """Return the plot of mutual information against top-1, each trial at its best evaluation; None if no trial measured
    it."""
    at = [(trial, point) for trial in trials if (point := _read(trial)) is not None]
    if not at:
        return None
    figure = blank("mutual information (nats), sum over terms", "held-out top-1 (%)", 420)
    for state, style in STYLES.items():
        group = [(trial, point) for trial, point in at if trial.state == state]
        figure.add_scatter(
            x=[point.nats for _, point in group],
            y=[point.top1 for _, point in group],
            hovertext=[
                hover(trial, metric, f"epoch {p.epoch}: {p.nats:.3g} nats, top-1 {p.top1:.2f} %") for trial, p in group
            ],
            hoverinfo="text",
            mode="markers",
            marker={"color": style.color, "symbol": style.symbol, "size": 9, "opacity": 0.85},
            name=state,
            showlegend=bool(group),
        )
    return figure


def finals_figure(finals: Sequence[Final]) -> Any:
    """Return the plot of top-1 for every seed, with mean and standard deviation; the first finalist on top."""
    names = [f"trial {final.trial}" for final in finals]
    figure = blank("top-1 on the held-out training rows (%)", "", 110 + 44 * len(finals))
    dots = [
        (place, seed, top1)
        for place, final in enumerate(finals)
        for seed, top1 in zip(final.seeds, final.top1, strict=True)
    ]
    figure.add_scatter(
        x=[top1 for _, _, top1 in dots],
        y=[place for place, _, _ in dots],
        hovertext=[f"{names[place]}, seed {seed}<br>{score_text(top1, 'top1')}" for place, seed, top1 in dots],
        hoverinfo="text",
        mode="markers",
        marker={"color": STYLES["completed"].color, "symbol": "circle-open", "size": 9, "line": {"width": 2}},
        name="one seed",
    )
    figure.add_scatter(
        x=[final.mean for final in finals],
        y=list(range(len(finals))),
        error_x={"type": "data", "array": [final.sd or 0.0 for final in finals], "thickness": 2, "width": 6},
        hovertext=[f"{name}<br>{mean_text(final)}" for name, final in zip(names, finals, strict=True)],
        hoverinfo="text",
        mode="markers",
        marker={"color": INK, "symbol": "diamond", "size": 10},
        name="mean ± standard deviation",
    )
    figure.update_yaxes(tickvals=list(range(len(finals))), ticktext=names, range=[len(finals) - 0.5, -0.5])
    return figure


def mean_text(final: Final) -> str:
    """Return a text such as "70.12 ± 0.31 % (3 seeds)"."""
    seeds = "1 seed" if len(final.seeds) == 1 else f"{len(final.seeds)} seeds"
    return f"{final.mean:.2f}{'' if final.sd is None else f' ± {final.sd:.2f}'} % ({seeds})"


def _add_scores(
    figure: Any, trials: Sequence[Trial], metric: str, x: dict[int, float], everyone: Sequence[Trial]
) -> None:
    """Add a marker for the score of each trial of `trials`, by state; those without one on the lower edge.

    The axis fits the scores of `everyone`, so that all plots of a report have the same one.
    """
    scores = [trial.score for trial in everyone if can_draw(trial.score)]
    log = metric != "top1" and spans_decades(scores)
    if scores:
        low, high = (math.log10(min(scores)), math.log10(max(scores))) if log else (min(scores), max(scores))
        room = (high - low) / 8 or abs(high) / 20 or 1.0
        low, high = low - (room if len(scores) == len(everyone) else 2 * room), high + room
    else:
        low, high = 0.0, 1.0
    figure.update_yaxes(type="log" if log else "linear", range=[low, high], showticklabels=bool(scores))
    edge = low + 0.03 * (high - low)
    edge = 10**edge if log else edge
    for state, style in STYLES.items():
        group = [trial for trial in trials if trial.state == state]
        figure.add_scatter(
            x=[x[trial.number] for trial in group],
            y=[trial.score if can_draw(trial.score) else edge for trial in group],
            hovertext=[hover(trial, metric, *([] if can_draw(trial.score) else ["no score"])) for trial in group],
            hoverinfo="text",
            mode="markers",
            marker={"color": style.color, "symbol": style.symbol, "size": 9, "opacity": 0.85},
            name=state,
            showlegend=bool(group),
        )


def _add_medians(figure: Any, places: Sequence[tuple[float, float]], metric: str) -> None:
    """Add a short bar at the median score of each category, given as (index, score)."""
    groups: dict[float, list[float]] = {}
    for at, score in places:
        groups.setdefault(at, []).append(score)
    medians = {at: statistics.median(scores) for at, scores in groups.items()}
    figure.add_scatter(
        x=[x for at in medians for x in (at - 0.35, at + 0.35, None)],
        y=[y for median in medians.values() for y in (median, median, None)],
        hovertext=[
            f"median {score_text(medians[at], metric)} of {len(groups[at])}" for at in medians for _ in range(3)
        ],
        hoverinfo="text",
        mode="lines",
        line={"color": INK, "width": 2},
        name="median",
    )


def _points(trial: Trial, metric: str) -> list[Point]:
    """Return the evaluations that can be drawn."""
    return [point for point in trial.curve if can_draw(getattr(point, metric))]


def _read(trial: Trial) -> Point | None:
    """Return the evaluation at the best epoch, or the last one, among those with mutual information."""
    read = [point for point in trial.curve if can_draw(point.nats) and can_draw(point.top1)]
    return next((point for point in read if point.epoch == trial.best_epoch), read[-1] if read else None)
