"""Sections that the page of a run and that of a comparison share."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from mimkd_ray import storage
from mimkd_ray.config.form.json_form import dotted
from mimkd_ray.data.sources.own_dataset import SCHEME
from mimkd_ray.pages.figures import bars_figure, plot_text
from mimkd_ray.pages.page import Cell, Page
from mimkd_ray.pages.run_records import RunRecord
from mimkd_ray.train.records.outcomes import CONFIG

RELIABILITY = (
    "How often a network is right where it says so with a given probability. The expected calibration error (ECE) is "
    "the mean distance from the diagonal, weighted by images."
)
MOST_CONFUSIONS = 20
MOST_BARS = 30
"""Most classes that have a bar: those that changed most. The table has them all."""


def number_cell(value: float | None, form: str = ".2f") -> Cell:
    """Return a cell of a number; an empty one for None and for what is not finite."""
    if value is None or not math.isfinite(value):
        return Cell("", math.nan)
    return Cell(format(value, form), value)


def class_gains(page: Page, columns: Mapping[str, Mapping[str, float]], rows: Mapping[str, int], text: str) -> None:
    """Add top-1 by class: `columns` are the networks, the first the one that the others are compared with; bars show
    the difference of the last."""
    page.section("classes", "Per class", text)
    (base_name, base), *others = columns.items()
    last_name, last = others[-1]
    gains = {name: last[name] - base[name] for name in base if name in last}
    by_gain = sorted(gains, key=lambda name: -gains[name])
    if len(by_gain) > MOST_BARS:
        by_gain = [*by_gain[: MOST_BARS // 2], *by_gain[-MOST_BARS // 2 :]]
        page.paragraph(f"The {MOST_BARS // 2} classes at either end; the table below has all {len(gains)}.")
    title = plot_text(f"{last_name} minus {base_name}, points of top-1")
    page.figure(bars_figure(by_gain, [gains[name] for name in by_gain], title))
    page.table(
        ["class", "images", f"{base_name} %", *(text for name, _ in others for text in (f"{name} %", "difference"))],
        [
            [
                Cell(name),
                Cell(str(rows.get(name, "")), rows.get(name, math.nan)),
                number_cell(base[name]),
                *(
                    cell
                    for _, values in others
                    for cell in (
                        number_cell(values.get(name)),
                        number_cell(_minus(values.get(name), base[name]), "+.2f"),
                    )
                ),
            ]
            for name in sorted(base, key=lambda name: gains.get(name, 0.0))
        ],
        sortable=True,
    )


def _minus(value: float | None, other: float) -> float | None:
    return None if value is None else value - other


def reproduction(page: Page, place: str, config: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Add the command that makes the run again, its versions, and its whole config."""
    page.section("again", "Make it again")
    if str(config.get("data", {}).get("root", "")).startswith(SCHEME):
        page.paragraph("Its data sets were objects of a Python process, so it takes that program: the config is below.")
        page.code("mimkd_ray.run(config, train=..., validation=...)", command=True)
    else:
        name = config.get("run", {}).get("name") or place.rstrip("/").rpartition("/")[2]
        arguments = ["--config", storage.join(place, CONFIG), "--run.name", f"{name}-again"]
        page.code(f"mimkd-ray train {shlex.join(arguments)}", command=True)
    if "redacted-" in str(config):
        page.paragraph("Passwords and signatures of URLs were left out of the config: give those URLs again.")
    versions = result.get("versions", {})
    digests = result.get("digests", {})
    layout = [(key.replace("_", " "), str(result[key])) for key in ("workers", "lanes", "lane_batch") if key in result]
    page.facts(
        [
            ("directory", place),
            *layout,
            *((name, str(value)) for name, value in result.get("machine", {}).items()),
            *((f"digest of the {name}", str(value)[:16]) for name, value in digests.items()),
            *((name, str(version)) for name, version in versions.items()),
        ]
    )
    page.json("The whole config", config)


def differing_fields(page: Page, runs: Mapping[str, RunRecord]) -> None:
    """Add a table of the fields of the config in which runs differ."""
    flat = {name: dict(dotted(run.config)) for name, run in runs.items()}
    fields = list(dict.fromkeys(field for values in flat.values() for field in values))
    rows = []
    for field in fields:
        values = [_in_words(flat[name].get(field, "")) for name in runs]
        if len(set(values)) > 1 and not field.startswith(("run.", "recipe", "train.seed")):
            rows.append([Cell(field), *(Cell(value) for value in values)])
    if rows:
        page.section("differences", "What differs", "Fields of the config that are not the same in all of them.")
        page.table(["field", *runs], rows)


def _in_words(value: Any) -> str:
    """Return the value of a field as it is given on a command line."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "by default" if value is None else str(value)


def size_tile(size: tuple[int, int], teacher_size: tuple[int, int] | None) -> tuple[str, str]:
    """Return the tile of a student's parameters, bytes and, where that is known, its teacher's."""
    text = f"parameters, {size[1] / 1e6:.1f} MB"
    if teacher_size is not None:
        ratio = teacher_size[0] / max(size[0], 1)
        text += f"; the teacher has {_parameters(teacher_size[0])}, {ratio:.1f} times as many"
    return _parameters(size[0]), text


def _parameters(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count / 1e3:.1f} k"


def confusions(page: Page, found: Mapping[str, Mapping[str, Any]], text: str) -> None:
    """Add the worst confusions of networks, if any: their evaluation.json by the heads of their columns."""
    pairs: dict[tuple[str, str], dict[str, int]] = {}
    for name, value in found.items():
        for each in value.get("confusions") or []:
            pairs.setdefault((str(each["label"]), str(each["prediction"])), {})[name] = each["count"]
    worst = sorted(pairs, key=lambda pair: -max(pairs[pair].values()))[:MOST_CONFUSIONS]
    if worst:
        page.section("confusions", "Worst confusions", text)
        page.table(
            ["label", "student says", *found],
            [[*map(Cell, pair), *(number_cell(pairs[pair].get(name), "d") for name in found)] for pair in worst],
        )


def top1_by_class(evaluation: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, int]]:
    """Return top-1 in percent and images by class, of evaluation.json."""
    entries: Sequence[Mapping[str, Any]] = evaluation.get("per_class") or []
    known = [entry for entry in entries if entry.get("top1") is not None]
    return {str(e["class"]): float(e["top1"]) for e in known}, {str(e["class"]): int(e["rows"]) for e in known}
