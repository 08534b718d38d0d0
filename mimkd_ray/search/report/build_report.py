"""The report.html of a hyperparameter search: Optuna's figures, tables and the best config, readable offline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mimkd_ray.console import clock
from mimkd_ray.errors import count
from mimkd_ray.pages.figures import BLUE, GREY, Line, cut, lines_figure, seeds_figure
from mimkd_ray.pages.page import Cell, Page
from mimkd_ray.pages.sections import number_cell
from mimkd_ray.search.report.study import LABELS, LEAST_TRIALS, LOG_SPAN, MOST_LINES, Study, can_draw
from mimkd_ray.search.trials import STATES, Final, Trial, Value, direction, param_names, ranked, value_text

AXIS_WIDTH = 110
"""Least distance of two axes of the parallel coordinates in CSS pixels; a narrower page scrolls them."""


def report_html(
    trials: Sequence[Trial],
    metric: str,
    title: str,
    facts: Mapping[str, str],
    finals: Sequence[Final] | None = None,
) -> str:
    """Return the report: a page of pages/page.py.

    ``facts`` are shown at the top, ``finals`` are in their order: the first one's config is the best. The same input
    gives the same text. All strings are shown literally, never as markup; numbers that are not finite are left out of
    plots and named in tables.
    """
    trials = sorted(trials, key=lambda trial: trial.number)
    best_first = ranked(trials, metric)
    page = Page(title)
    _head(page, trials, metric, facts, finals)
    if finals:
        _finals(page, finals)
    if not trials:
        page.paragraph("No trial has begun.")
        return page.html()
    study = Study(trials, metric)
    if study.scored:
        _figures(page, study)
    else:
        page.paragraph("No trial is usable so far.")
    if best_first:
        best, how = best_first[0], "the best score"
        if finals:
            best, how = next(trial for trial in trials if trial.number == finals[0].trial), "the best finalist, score"
        page.section("best", "Best config", f"Of trial {best.number}, {how} {_score(best.score, metric)}.")
        page.facts([(name, cut(value_text(value), 400)) for name, value in best.params.items()])
        page.json("The whole config", best.config)
    _failures(page, [trial for trial in trials if trial.state == "failed"])
    _tables(page, trials, metric, best_first)
    return page.html()


def _score(score: float | None, metric: str) -> str:
    """Return a score as text, such as "63.21 %" or "1.432 nats", a dash for None."""
    if score is None:
        return "–"
    return f"{score:.2f} %" if metric in ("top1", "knn") else f"{score:.4g} nats"


def _head(
    page: Page, trials: Sequence[Trial], metric: str, facts: Mapping[str, str], finals: Sequence[Final] | None
) -> None:
    counts = [(state, sum(trial.state == state for trial in trials)) for state in STATES]
    best = ranked(trials, metric)[:1]
    label = LABELS.get(metric, metric).partition(" (")[0]
    tiles = [
        (f"{final.mean:.2f} %", f"top-1 of the best finalist, trial {final.trial}") for final in (finals or [])[:1]
    ]
    tiles += [(_score(best[0].score, metric), f"best {label}, trial {best[0].number}")] if best else []
    tiles += [(str(number), state) for state, number in counts if number or state == "completed"]
    page.tiles([*tiles, (clock(sum(t.seconds for t in trials if math.isfinite(t.seconds))), "h:mm:ss in all trials")])
    better = "higher" if direction(metric) == "maximize" else "lower"
    page.facts([("scored by", f"{LABELS[metric]}, {better} is better"), *facts.items()])


def _finals(page: Page, finals: Sequence[Final]) -> None:
    page.section(
        "finals",
        "Finalists, trained anew",
        "The best few trials with new seeds, scored on held-out training rows; the validation set was not looked at.",
    )
    page.figure(seeds_figure({f"trial {final.trial}": final.top1 for final in finals}, "top-1 (%)"))
    page.table(
        ["trial", "mean ± standard deviation", "top-1 in % (seed)"],
        [
            [
                Cell(str(final.trial), final.trial),
                Cell(f"{final.mean:.2f}{'' if final.sd is None else f' ± {final.sd:.2f}'} %"),
                Cell(", ".join(f"{top1:.2f} ({seed})" for seed, top1 in zip(final.seeds, final.top1, strict=True))),
            ]
            for final in finals
        ],
    )


def _figures(page: Page, study: Study) -> None:
    page.section("history", "Score by trial", "Completed and stopped trials. Drag to zoom in; double-click to return.")
    page.figure(study.history())
    if len(study.scored) > 1:
        page.figures([("Share of trials up to a score", study.edf())])
    if study.varying:
        page.section("parameters", "Each hyperparameter against the score", "Orange trials are early, blue ones late.")
        page.figures([(cut(name, 80), study.slice(name)) for name in study.varying])
    some = [name for name in study.varying if name not in study.shared]
    fewer = f" Without those that only some trials have: {', '.join(cut(name, 60) for name in some)}." if some else ""
    lines = f"One line a trial, of the best {MOST_LINES}." if len(study.scored) > MOST_LINES else "One line a trial."
    _schedules(page, study)
    if study.shared:
        page.section("parallel", "Parallel coordinates", f"{lines} Its colour is its score, on the first axis.{fewer}")
        page.figure(study.parallel(), least_width=AXIS_WIDTH * (len(study.shared) + 1))
    page.section("importance", "Importance of hyperparameters")
    importances = study.importances()
    if importances is None:
        page.paragraph(
            f"Not known: it takes {LEAST_TRIALS} trials with different scores and a hyperparameter that all of them "
            f"have and that varies; so far {count(len(study.scored), 'trial')} with a score."
        )
    else:
        page.paragraph(
            "fANOVA: how much of the variance of the trials' ranks one hyperparameter explains by itself. With few "
            f"trials this is a hint, no proof.{fewer}"
        )
        page.figure(importances)
    page.section("curves", "Learning curves", lines)
    page.figure(study.curves())


def _schedules(page: Page, study: Study) -> None:
    """What the members of a population went through."""
    members = [trial for trial in study.scored if trial.schedule]
    figures = []
    for name in param_names([replace(each, params=own) for each in members for _, own in each.schedule]):
        lines = []
        for trial in members:
            x, y = [0], list[float | None]()
            for epoch, params in trial.schedule:
                if epoch > x[-1]:  # else trained for no epoch
                    x += [epoch, epoch]
                    y += [value if can_draw(value := params.get(name)) else None] * 2
            style = (BLUE, "solid", True) if trial is members[0] else (GREY, "dot", False)
            lines.append(Line(f"trial {trial.number}", x[: len(y)], y, *style))
        if any(len({*line.y} - {None}) > 1 for line in lines):
            values = [value for line in lines for value in line.y if value is not None]
            figure = lines_figure(lines[::-1], "epoch", "")
            if min(values) > 0 and max(values) / min(values) >= LOG_SPAN:
                figure.update_yaxes(type="log")
            figures.append((cut(name, 80), figure))
    if figures:
        page.section(
            "schedules",
            "Schedules of the population",
            f"What the weights of each member were trained with, by epoch. The blue line is that of trial "
            f"{members[0].number}, the best; a member that went on from another has that one's past.",
        )
        page.figures(figures)


def _failures(page: Page, failed: Sequence[Trial]) -> None:
    """Why trials failed: the table of all has the reason behind every hyperparameter."""
    alike: dict[tuple[str, str], list[int]] = {}
    for trial in failed:
        alike.setdefault((trial.kind, trial.reason), []).append(trial.number)
    if alike:
        page.section("failures", "Failed trials")
        rows = [
            [Cell(kind), Cell(", ".join(map(str, numbers)), long=len(numbers) > 1), Cell(reason, long=True)]
            for (kind, reason), numbers in alike.items()
        ]
        page.table(["kind", "trials", "reason"], rows)


def _tables(page: Page, trials: Sequence[Trial], metric: str, best_first: Sequence[Trial]) -> None:
    page.section("trials", "All trials", "The best first. A click on a head sorts by it, a second one the other way.")
    names = param_names(trials)
    known = {trial.number for trial in best_first}
    rows = [
        [
            number_cell(trial.number, "d"),
            Cell(trial.state),
            Cell(trial.kind),
            Cell(_score(trial.score, metric), math.nan if trial.score is None else trial.score),
            number_cell(trial.best_epoch, "d"),
            number_cell(trial.seconds, ".0f"),
            *(_parameter(trial.params.get(name)) for name in names),
            Cell(cut(trial.reason, 80), long=True),
        ]
        for trial in [*best_first, *(trial for trial in trials if trial.number not in known)]
    ]
    heads = ["trial", "state", "kind", LABELS[metric], "best epoch", "seconds", *(cut(n, 60) for n in names), "reason"]
    page.table(heads, rows, sortable=True)


def _parameter(value: Value | None) -> Cell:
    text = "" if value is None else cut(value_text(value), 80)
    if value is None or isinstance(value, bool | str):
        return Cell(text)
    return Cell(text, value if can_draw(value) else math.nan)
