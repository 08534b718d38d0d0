"""Texts about a trial for tables, axes and hover texts."""

from __future__ import annotations

import html
import math
import re
import textwrap
from collections.abc import Iterable

from mimkd_ray.search.trials import Trial, Value, is_finite

LABELS = {"top1": "held-out top-1", "cross_entropy": "held-out cross-entropy"}
UNITS = {"top1": "%", "cross_entropy": "nats"}

MOST_PARAMS = 16
"""Most parameters in a hover text; the table has them all."""


def axis_label(metric: str) -> str:
    """Return the label of an axis, such as "held-out top-1 (%)"."""
    return f"{LABELS[metric]} ({UNITS[metric]})"


def score_text(score: float | None, metric: str) -> str:
    """Return a score as text, such as "63.21 %" or "1.432 nats", a dash for None, and NaN and infinities by their
    names."""
    if score is None:
        return "–"
    if not math.isfinite(score):
        return str(score)
    return f"{score:.2f} %" if metric == "top1" else f"{score:.4g} nats"


def value_text(value: Value) -> str:
    """Return a parameter's value as text: 0.05, 128, true, nce. Floats with four digits."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def cut(text: str, width: int) -> str:
    """Return `text`, shortened to `width` characters."""
    return text if len(text) <= width else text[: width - 1] + "…"


def wrapped_name(name: str, width: int) -> str:
    """Return a parameter's name for Plotly in lines of about `width` characters, broken after signs and spaces."""
    lines = [""]
    for part in re.findall(r"[^._/: ]*[._/: ]|[^._/: ]+", cut(name, 4 * width)):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return plot_lines(lines)


def plot_text(text: str) -> str:
    """Return `text` escaped for Plotly, which interprets a few HTML tags in its labels."""
    return html.escape(text, quote=False)


def plot_lines(lines: Iterable[str]) -> str:
    """Return several lines of one Plotly label, each shown literally."""
    return "<br>".join(map(plot_text, lines))


def hover(trial: Trial, metric: str, *more: str) -> str:
    """Return the hover text of a trial: number, state, score, `more` lines, parameters, and the reason of its end."""
    state = f"{trial.state} ({trial.kind})" if trial.kind else trial.state
    lines = [f"trial {trial.number}, {state}", *more]
    if is_finite(trial.score):
        at = "" if trial.best_epoch is None else f" at epoch {trial.best_epoch}"
        lines.append(f"{LABELS[metric]} {score_text(trial.score, metric)}{at}")
    shown = list(trial.params.items())[:MOST_PARAMS]
    lines += [f"{cut(name, 40)} = {cut(value_text(value), 40)}" for name, value in shown]
    if len(trial.params) > len(shown):
        lines.append(f"and {len(trial.params) - len(shown)} more")
    if trial.state != "completed":
        lines += textwrap.wrap(cut(trial.reason, 240), 60)
    return plot_lines(lines)
