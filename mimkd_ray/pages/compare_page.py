"""The report.html of a comparison: several arms with several seeds, or runs that somebody puts side by side."""

from __future__ import annotations

import posixpath
import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from mimkd_ray import storage
from mimkd_ray.errors import count
from mimkd_ray.pages.figures import Line, color_of, lines_figure, reliability_figure, seeds_figure
from mimkd_ray.pages.page import Cell, Page
from mimkd_ray.pages.run_page import column
from mimkd_ray.pages.run_records import REPORT, RunRecord
from mimkd_ray.pages.sections import (
    RELIABILITY,
    class_gains,
    confusions,
    differing_fields,
    number_cell,
    reproduction,
    size_tile,
    top1_by_class,
)
from mimkd_ray.retries import place_of
from mimkd_ray.train.compare import clear, summarise

LABELS = {"alone": "student alone", "kd": "Hinton's KD", "mimkd": "MIMKD"}

Arms = Mapping[str, Sequence[RunRecord]]


def compare_page(arms: Arms, place: str, config: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Return the page of a comparison of arms, each with runs in the order of its seeds, in the folder `place`. The
    first arm without a teacher, or else the first, is what the others are compared with. `config` and `result` say how
    it is made again; without a config that is left out."""
    arms = {LABELS.get(arm, arm): runs for arm, runs in arms.items()}
    base = next((arm for arm, runs in arms.items() if not runs[0].uses_teacher), next(iter(arms)))
    summaries = _summaries(arms, base)
    names = list(dict.fromkeys(run.student_name for runs in arms.values() for run in runs))
    teacher = next((run for runs in arms.values() for run in runs if run.teacher), None)
    taught = f" taught by {teacher.teacher_name}" if teacher is not None else ""
    page = Page(f"{', '.join(names[:3])}{taught}: {', '.join(arms)}")
    _headline(page, arms, summaries, base, teacher)
    _table(page, arms, summaries, base)
    _curves(page, arms)
    _classes(page, arms, base)
    _evaluations(page, arms)
    _runs(page, arms, place)
    differing_fields(page, {arm: runs[0] for arm, runs in arms.items()})
    if config:
        reproduction(page, place, config, result)
    return page.html()


def _summaries(arms: Arms, base: str) -> dict[str, dict[str, Any]]:
    """Return the figures of the arms that have a finished run with a top-1 (train/compare.py): paired by seed with the
    base's."""

    def finished(arm: str) -> dict[int, Any]:
        return {run.seed: run.result for run in arms[arm] if run.result and run.top1 is not None}

    first, found = finished(base), {}
    for arm in arms:
        own = finished(arm)
        both = sorted(own.keys() & first.keys())
        if own:
            done = [own[seed] for seed in (both or own)]
            found[arm] = summarise(done, [first[seed] for seed in both] if both and arm != base else None)
    return found


def _headline(
    page: Page, arms: Arms, summaries: Mapping[str, Mapping[str, Any]], base: str, teacher: RunRecord | None
) -> None:
    tiles = []
    if summaries:
        best = max(summaries, key=lambda arm: summaries[arm]["mean"])
        tiles.append((f"{summaries[best]['mean']:.2f} %", f"held-out top-1 of {best}, the highest mean"))
        gain = summaries[best].get("against_alone")
        if gain is not None:
            better = f"points over {base}, better in {gain['wins']} of {count(gain['of'], 'seed')}"
            tiles.append((_gain_text(gain), f"{better}: {_judged(gain)}"))
        if base in summaries and best != base:
            tiles.append((f"{summaries[base]['mean']:.2f} %", f"held-out top-1 of {base}"))
    if teacher is not None and teacher.teacher_top1 is not None:
        tiles.append((f"{teacher.teacher_top1:.2f} %", f"held-out top-1 of the teacher, {teacher.teacher_name}"))
    sized = next((run for runs in arms.values() for run in runs if run.size), None)
    if sized is not None and sized.size is not None:
        tiles.append(size_tile(sized.size, teacher.teacher_size if teacher is not None else None))
    ended = sum(bool(run.result) for runs in arms.values() for run in runs)
    tiles.append((str(ended), f"finished runs of {sum(map(len, arms.values()))}"))
    page.tiles(tiles)


def _judged(gain: Mapping[str, Any]) -> str:
    if gain["of"] < 3:
        return "too few seeds to say that it helps (fewer than 3)"
    return f"a clear {word}" if (word := clear(gain)) else "no clear difference"


def _gain_text(gain: Mapping[str, Any]) -> str:
    error = gain["standard_error"]
    return f"{gain['mean']:+.2f}" + ("" if error is None else f" ± {error:.2f}")


def _table(page: Page, arms: Arms, summaries: Mapping[str, Mapping[str, Any]], base: str) -> None:
    page.section(
        "arms",
        "Side by side",
        f"Held-out top-1: mean and standard deviation over seeds. Against {base}: mean of the differences of the same "
        "seed, with its standard error.",
    )
    rows = []
    for arm, runs in arms.items():
        done = [run.result for run in runs if run.result]
        if not done:
            rows.append([Cell(arm), number_cell(runs[0].top1), *[Cell("")] * 3, Cell("not finished")])
            continue
        found = summaries.get(arm, {})
        gain, sd = found.get("against_alone"), found.get("sd")
        spread = "" if sd is None else f" ± {sd:.2f}"
        nats = [value["nats"] for each in done for value in each["nats"].values() if value["nats"] is not None]
        rows.append(
            [
                Cell(arm),
                Cell(f"{found['mean']:.2f}{spread}", found["mean"]) if found else Cell(""),
                Cell("") if gain is None else Cell(_gain_text(gain), gain["mean"]),
                Cell("") if gain is None else Cell(f"{gain['wins']} of {gain['of']}"),
                number_cell(sum(nats) / len(done) if nats else None),
                number_cell(statistics.median(each["images_per_second"] for each in done), ",.0f"),
            ]
        )
    page.table(["", "top-1 %", f"against {base}", "better in", "nats, all terms", "images/s"], rows)
    groups = {arm: found["top1"] for arm, found in summaries.items()}
    if groups:
        page.figure(seeds_figure(groups, "held-out top-1 (%)"))


def _curves(page: Page, arms: Arms) -> None:
    page.section("curves", "Curves", "One line a run, one colour an arm.")

    def drawn(key: str, evaluations: bool, y_title: str) -> Any:
        lines = []
        for place, (arm, runs) in enumerate(arms.items()):
            for number, run in enumerate(runs):
                if key in ("top1", "cross_entropy") and not run.head_learns:
                    continue
                source = run.evals if evaluations else run.train
                y = [_nats(line) for line in source] if key == "nats" else column(source, key)
                if any(value is not None for value in y):
                    lines.append(Line(arm, column(source, "epoch"), y, color_of(place), legend=number == 0))
        if all(len(line.x) < 2 for line in lines):  # a figure of the table above, as of runs evaluated at their ends
            return None
        return lines_figure(lines, "epoch", y_title, from_zero=key in ("lr", "images_per_second"), named=True)

    figures = [
        ("Held-out top-1", drawn("top1", True, "%")),
        ("Held-out top-1 by k nearest neighbours", drawn("knn", True, "%")),
        ("Held-out cross-entropy", drawn("cross_entropy", True, "nats")),
        ("Cross-entropy in training", drawn("ce", False, "nats")),
        ("Information, held out, sum of terms", drawn("nats", True, "nats")),
        ("Learning rate", drawn("lr", False, "")),
        ("Images/s so far", drawn("images_per_second", False, "images/s")),
    ]
    page.figures([(title, figure) for title, figure in figures if figure is not None])


def _nats(line: Mapping[str, Any]) -> float | None:
    found = [value for key, value in line.items() if key.endswith("/nats") and value is not None]
    return sum(found) if found else None


def _classes(page: Page, arms: Arms, base: str) -> None:
    """Add top-1 by class, the mean over the runs of an arm that were evaluated."""
    columns: dict[str, dict[str, float]] = {}
    rows: dict[str, int] = {}
    for arm in (base, *(arm for arm in arms if arm != base)):
        found = [top1_by_class(run.evaluation) for run in arms[arm] if run.evaluation]
        for values, counts in found[:1]:
            rows |= counts
            columns[arm] = {name: statistics.fmean(each[name] for each, _ in found if name in each) for name in values}
    if base in columns and len(columns) > 1:
        class_gains(page, columns, rows, f"Top-1 by class of the runs that were evaluated; bars against {base}.")


def _evaluations(page: Page, arms: Arms) -> None:
    """Add confusions and reliability of the first run of each arm that was evaluated."""
    found = {arm: next((run.evaluation for run in runs if run.evaluation), None) for arm, runs in arms.items()}
    known = {arm: evaluation for arm, evaluation in found.items() if evaluation}
    bins = {arm: (value.get("calibration") or {}).get("bins") for arm, value in known.items()}
    if any(bins.values()):
        page.section("calibration", "Reliability", f"{RELIABILITY} Of the first run of an arm that was evaluated.")
        colors = {arm: color_of(place) for place, arm in enumerate(arms)}
        shown = {arm: value for arm, value in bins.items() if value}
        page.facts([(arm, f"ECE {known[arm]['calibration']['ece']:.4g}") for arm in shown])
        page.figures([("Accuracy by confidence", reliability_figure(shown, colors))])
    confusions(page, known, "Images of the same runs; empty: not among an arm's worst.")


def _runs(page: Page, arms: Arms, folder: str) -> None:
    """Add every run with a link to its own page, or the command that makes it."""
    page.section("runs", "The runs", "Pages of their own have confusions, reliability and the worst images.")
    if not all(run.evaluation for runs in arms.values() for run in runs):
        page.paragraph("Once they are evaluated, mimkd-ray report makes this page again with their figures.")
    rows = []
    for arm, runs in arms.items():
        for run in runs:
            own = storage.join(run.place, REPORT)
            near = place_of(own) == place_of(folder) and storage.exists(own)
            link = quote(posixpath.relpath(own, folder)) if near else ""
            command = "" if run.evaluation else f"mimkd-ray evaluate {shlex.quote(run.place)}"
            rows.append([Cell(arm), Cell(run.place, link=link), number_cell(run.top1), Cell(command, long=True)])
    page.table(["", "run", "top-1 %", "not evaluated yet"], rows)
