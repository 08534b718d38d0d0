"""The table at the end of a job, from its result.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mimkd_ray.errors import DamagedDataError, count
from mimkd_ray.train.compare import clear
from mimkd_ray.train.records.progress import reading

LABELS = {"alone": "student alone", "kd": "student, Hinton KD", "mimkd": "student, MIMKD"}

SHAPE = (AttributeError, KeyError, TypeError, ValueError)
"""Errors of JSON of another shape than this release writes."""


def result_table(result: Mapping[str, Any]) -> str:
    """Return the table of teacher and student (or every arm of a comparison) with top-1, mutual information and
    images/s. Raises DamagedDataError for what is no result."""
    try:
        return _comparison(result) if "compare" in result else _single(result)
    except SHAPE as error:
        raise DamagedDataError(
            f"the run's result.json is damaged, or of another release ({type(error).__name__}: {error}): remove it, "
            "and the run's own command goes on from its last checkpoint and writes it anew"
        ) from error


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as text, the first as its head, the first column to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _information(nats: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    lines = [f"  {name}: {reading(value['nats'], value['ceiling'], digits=3)}" for name, value in nats.items()]
    return ["mutual information on held-out images:", *lines] if lines else []


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def _single(result: Mapping[str, Any]) -> str:
    student, teacher = result["student"], result.get("teacher")
    rows = [["", "top-1 %", "against teacher" if teacher else "", "top-5 %", "images/s"]]
    gap = ""
    if teacher:
        rows.append([f"teacher {teacher['name']}", _percent(teacher["top1"]), "", _percent(teacher["top5"]), ""])
        by_head = "knn" not in student  # where images lack labels, the head may have learned from few or none
        if by_head and "-" not in (_percent(student["top1"]), _percent(teacher["top1"])):
            gap = f"{student['top1'] - teacher['top1']:+.2f}"
    rate = f"{result['images_per_second']:.0f}"
    name, of_head = f"student {student['name']}", student.get("head_learns", True)
    if of_head:
        rows.append([name, _percent(student["top1"]), gap, _percent(student["top5"]), rate])
    if "knn" in student:
        rows.append(["student by k-NN" if of_head else f"{name} by k-NN", _percent(student["knn"]), "", "", ""])
        rows[-1][-1] = "" if of_head else rate
    return "\n".join([columns(rows), *_information(result["nats"])])


def _comparison(result: Mapping[str, Any]) -> str:
    rows = [["", "top-1 %", "against alone", "better in", "images/s"]]
    teacher = result.get("teacher")
    if teacher:
        rows.append([f"teacher {teacher['name']}", _percent(teacher["top1"]), "", "", ""])
    for arm, value in result["compare"].items():
        spread = "" if value["sd"] is None else f" ± {value['sd']:.2f}"
        gain, wins = "", ""
        if "against_alone" in value:
            paired = value["against_alone"]
            error = "" if paired["standard_error"] is None else f" ± {paired['standard_error']:.2f}"
            gain, wins = f"{paired['mean']:+.2f}{error}", f"{paired['wins']} of {paired['of']}"
        rate = f"{value['images_per_second']:.0f}"
        rows.append([LABELS.get(arm, f"student, {arm}"), f"{value['mean']:.2f}{spread}", gain, wins, rate])
    head = (
        f"{result['recipe']}: student {result['student']['name']}, {result['train_rows']} training images, "
        f"{result['held_out_rows']} held out, {count(result['seeds'], 'seed')}, {count(result['workers'], 'worker')}\n"
        "top-1: mean ± standard deviation over seeds; against alone: mean paired difference ± its standard error"
    )
    nats = result["compare"].get("mimkd", {}).get("nats", {})
    return "\n".join([head, columns(rows), *_information(nats), *_verdict(result["compare"])])


def _verdict(arms: Mapping[str, Any]) -> list[str]:
    """Return the verdict in words."""
    lines = []
    seeds = max(len(value["top1"]) for value in arms.values())
    if seeds < 3:
        few = "Two seeds are" if seeds == 2 else "One seed is"
        return [f"{few} too few to say who helps and who harms: pass --compare.seeds 3 or more."]
    for arm in ("kd", "mimkd"):
        paired = arms.get(arm, {}).get("against_alone")
        if paired and paired["standard_error"] is not None:
            word = {"gain": "helps", "loss": "harms"}.get(clear(paired), "makes no clear difference to")
            lines.append(f"{LABELS[arm].removeprefix('student, ')} {word} the student.")
    if "kd" in arms and "mimkd" in arms and "against_alone" in arms["mimkd"]:
        ahead = "MIMKD" if arms["mimkd"]["mean"] > arms["kd"]["mean"] else "Hinton KD"
        lines.append(f"The higher mean is {ahead}'s.")
    return lines
