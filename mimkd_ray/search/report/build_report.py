"""The report.html of a hyperparameter search: one file with plots, tables and the best config, readable offline."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from mimkd_ray.console import clock
from mimkd_ray.search.report.axes import can_draw, value_of
from mimkd_ray.search.report.figures import (
    curves_figure,
    finals_figure,
    importance_figure,
    information_figure,
    mean_text,
    objective_figure,
    slice_figure,
)
from mimkd_ray.search.report.importance import LEAST_TRIALS, Importance, importances
from mimkd_ray.search.report.page import Cell, Page
from mimkd_ray.search.report.parallel_coordinates import AXIS_WIDTH, parallel_figure
from mimkd_ray.search.report.wording import LABELS, UNITS, cut, score_text, value_text
from mimkd_ray.search.trials import STATES, Final, Trial, direction, is_finite, param_names, ranked
from mimkd_ray.train.records.run_dir import jsonable

MOST_AXES = 12
"""Most parameters in the parallel coordinates: the most important ones."""


def report_html(
    trials: Sequence[Trial],
    metric: str,
    title: str,
    facts: Mapping[str, str],
    finals: Sequence[Final] | None = None,
) -> str:
    """Return the report, 5.2 MB for 40 trials and 7.3 MB for 300, of which 4.8 MB are Plotly.

    Cost on one core: 0.6 s for 40 trials and 4 s for 300, and 3 s of imports once.

    ``facts`` are shown at the top. The same input gives the same text. All strings are shown literally, never as
    markup; numbers that are not finite are left out of plots and named in tables. Raises UserError for an unknown
    metric.
    """
    trials = sorted(trials, key=lambda trial: trial.number)
    best_first = ranked(trials, metric)
    found = importances(trials, metric)
    page = Page(title)
    _head(page, trials, metric, facts)
    if finals:
        _finals(page, finals)
    if trials:
        page.section(
            "objective",
            "Objective by trial",
            f"The best {LABELS[metric]} of each trial, on rows that were held out of its training set. Those without a "
            "score lie on the lower edge.",
        )
        page.figure(objective_figure(trials, metric))
        varying = _parameters(page, trials, metric)
        if varying:
            _parallel(page, trials, metric, varying, found)
        _importance(page, found, len(best_first))
        _curves(page, trials, metric)
    if best_first:
        best = best_first[0]
        page.section("best", "Best config", f"Of trial {best.number}: {score_text(best.score, metric)}.")
        page.facts([(name, cut(value_text(value), 400)) for name, value in best.params.items()])
        page.code(json.dumps(jsonable(best.config), indent=2))
    if trials:
        _tables(page, trials, metric, best_first)
    else:
        page.paragraph("No trial has begun.")
    return page.html()


def _head(page: Page, trials: Sequence[Trial], metric: str, facts: Mapping[str, str]) -> None:
    counts = [(state, sum(trial.state == state for trial in trials)) for state in STATES]
    best = ranked(trials, metric)[:1]
    tiles = [(score_text(best[0].score, metric), f"best {LABELS[metric]}, trial {best[0].number}")] if best else []
    tiles += [(str(count), state) for state, count in counts if count or state == "completed"]
    page.tiles([*tiles, (clock(sum(t.seconds for t in trials if is_finite(t.seconds))), "h:mm:ss in all trials")])
    better = "higher" if direction(metric) == "maximize" else "lower"
    page.facts([("scored by", f"{LABELS[metric]} ({UNITS[metric]}), {better} is better"), *facts.items()])
    if trials:
        page.paragraph(
            "A point names its trial when you hover over it. Drag to zoom into a plot; double-click to return."
        )


def _finals(page: Page, finals: Sequence[Final]) -> None:
    best_first = sorted(finals, key=lambda final: (not is_finite(final.mean), -final.mean, final.trial))
    page.section(
        "finals",
        "Finalists, trained anew",
        "The best few trials with new seeds, scored on held-out training rows; the validation set was not looked at.",
    )
    page.figure(finals_figure(best_first))
    page.table(
        ["trial", "mean ± standard deviation", "top-1 in % (seed)"],
        [
            [
                Cell(str(final.trial), final.trial),
                Cell(mean_text(final)),
                Cell(", ".join(f"{top1:.2f} ({seed})" for seed, top1 in zip(final.seeds, final.top1, strict=True))),
            ]
            for final in best_first
        ],
    )


def _parameters(page: Page, trials: Sequence[Trial], metric: str) -> list[str]:
    """Add the slices of parameters that vary; return their names."""
    values = {name: [v for t in trials if (v := value_of(t, name)) is not None] for name in param_names(trials)}
    varying = [name for name, had in values.items() if len(set(map(value_text, had))) > 1]
    page.section("parameters", "Each hyperparameter against the objective")
    if varying:
        page.paragraph(
            "Numbers that span decades are on a logarithmic axis; a bar marks the median of a category. Trials "
            "without a score lie on the lower edge."
        )
    figures = []
    for name in varying:
        some = "" if len(values[name]) == len(trials) else f" ({len(values[name])} of {len(trials)} trials have it)"
        figures.append((cut(name, 80) + some, slice_figure(trials, metric, name)))
    page.figures(figures)
    fixed = [
        f"{cut(name, 80)} = {cut(value_text(had[0]), 80)}"
        for name, had in values.items()
        if had and name not in varying
    ]
    if fixed:
        page.paragraph(f"The same in every trial that had it: {'; '.join(fixed)}.")
    elif not varying:
        page.paragraph("No trial had a hyperparameter.")
    return varying


def _parallel(
    page: Page, trials: Sequence[Trial], metric: str, varying: Sequence[str], found: Sequence[Importance]
) -> None:
    by_importance = {item.name: place for place, item in enumerate(found)}
    names = sorted(varying, key=lambda name: by_importance.get(name, len(by_importance)))[:MOST_AXES]
    fewer = f" The {MOST_AXES} most important of {len(varying)} parameters." if len(names) < len(varying) else ""
    page.section(
        "parallel",
        "Parallel coordinates",
        "One line a trial: the darker, the better; the best one is green, and dashed ones failed or are running. A "
        f"line passes below the axis of a parameter that its trial did not have.{fewer}",
    )
    page.figure(parallel_figure(trials, metric, names), least_width=AXIS_WIDTH * (len(names) + 1))


def _importance(page: Page, found: Sequence[Importance], scored: int) -> None:
    page.section("importance", "Importance of hyperparameters")
    if not found:
        page.paragraph(
            f"Not known: it takes {LEAST_TRIALS} trials with different scores that share a parameter which varies; "
            f"{scored} have ended with a score."
        )
        return
    page.paragraph(
        "fANOVA: how much of the variance of the trials' ranks one parameter explains by itself, over completed and "
        "stopped trials. Bars of one colour are compared with each other; a conditional parameter is judged among the "
        "trials that have it. With few trials this is a hint, no proof."
    )
    page.figure(importance_figure(found))


def _curves(page: Page, trials: Sequence[Trial], metric: str) -> None:
    page.section("curves", "Learning curves", "One line a trial; the marker at its end says how it ended.")
    if any(is_finite(getattr(point, metric)) for trial in trials for point in trial.curve):
        page.figure(curves_figure(trials, metric))
    else:
        page.paragraph("No trial was evaluated.")
    page.section("information", "Mutual information against top-1", "Each trial at its best evaluation.")
    information = information_figure(trials, metric)
    if information is None:
        page.paragraph("No trial has read mutual information.")
    else:
        page.figure(information)


def _tables(page: Page, trials: Sequence[Trial], metric: str, best_first: Sequence[Trial]) -> None:
    failed = [trial for trial in trials if trial.state == "failed"]
    if failed:
        page.section("failed", "Failed trials")
        page.table(
            ["trial", "kind", "seconds", "reason"],
            [[Cell(str(t.number), t.number), Cell(t.kind), _seconds(t), Cell(t.reason, long=True)] for t in failed],
            sortable=True,
        )
    page.section("trials", "All trials", "The best first. A click on a head sorts by it, a second one the other way.")
    names = param_names(trials)
    known = {trial.number for trial in best_first}
    rows = []
    for trial in [*best_first, *(trial for trial in trials if trial.number not in known)]:
        rows.append(
            [
                Cell(str(trial.number), trial.number),
                Cell(trial.state),
                Cell(trial.kind),
                Cell(score_text(trial.score, metric), math.nan if trial.score is None else trial.score),
                Cell("", math.nan) if trial.best_epoch is None else Cell(str(trial.best_epoch), trial.best_epoch),
                _seconds(trial),
                *(_parameter(trial, name) for name in names),
                Cell(trial.reason, long=True),
            ]
        )
    heads = ["trial", "state", "kind", LABELS[metric], "best epoch", "seconds", *(cut(n, 60) for n in names), "reason"]
    page.table(heads, rows, sortable=True)


def _seconds(trial: Trial) -> Cell:
    return Cell(f"{trial.seconds:.0f}", trial.seconds)


def _parameter(trial: Trial, name: str) -> Cell:
    value = trial.params.get(name)
    if value is None:
        return Cell("")
    if isinstance(value, bool | str):
        return Cell(cut(value, 80) if isinstance(value, str) else value_text(value))
    return Cell(value_text(value), value if can_draw(value) else math.nan)
