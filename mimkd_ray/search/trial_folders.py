"""The stored state of a search: one folder for each trial, below the search's own.

    config.json                 the search job
    trials/0007/trial.json      number, pack, hyperparameters; written when the trial is chosen
    trials/0007/...             the trial's run directory: config, metrics, checkpoints, best student
    trials/0007/ended.json      state, kind and reason of its end; written last
    trials.parquet  best.json  report.html

A trial with the first file and without the last one is unfinished and is resumed after a restart. All files are plain
JSON, so a search is resumed without unpickling. Only the driver of the search writes these files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mimkd_ray import storage
from mimkd_ray.config.search import Metric
from mimkd_ray.errors import DamagedDataError
from mimkd_ray.json_files import read_if_sound, read_json
from mimkd_ray.search.trials import Point, Trial, Value, direction
from mimkd_ray.train.records.run_dir import read_metrics, write_json

DAMAGED = "remove the trial's folder, and another trial takes its place"
THREADS = 16
"""Threads that read trials from object storage."""

Ending = Literal["", "early", "budget", "out of memory", "non-finite", "error", "lost"]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The end of a trial: state, kind, reason and time."""

    state: Literal["completed", "stopped", "failed"]
    kind: Ending = ""
    reason: str = ""
    seconds: float = 0.0
    """Duration of its last start."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Seconds of the stages before its first step."""


@dataclass(frozen=True)
class Planned:
    """A trial that is to run, new or from before a restart."""

    number: int
    pack: int
    """First number of its pack; its own number if it is alone."""
    params: Mapping[str, Value]
    config: Mapping[str, Any]
    """The whole config as JSON."""


class Ledger:
    """The writer and reader of the trials' folders."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def place(self, number: int) -> str:
        """Return the run directory of a trial."""
        return storage.join(self.folder, "trials", f"{number:04d}")

    def begin(self, planned: Planned) -> None:
        """Record a new trial."""
        value = {"number": planned.number, "pack": planned.pack, "params": dict(planned.params)}
        write_json(storage.join(self.place(planned.number), "trial.json"), value | {"config": planned.config})

    def end(self, number: int, ended: Ended) -> None:
        """Record a trial's end."""
        value = {"state": ended.state, "kind": ended.kind, "reason": ended.reason, "seconds": ended.seconds}
        write_json(storage.join(self.place(number), "ended.json"), value | {"details": dict(ended.details)})

    def read(self, metric: Metric) -> tuple[list[Trial], dict[int, int]]:
        """Return all trials by number, with their curves, and their packs."""
        folders = sorted(storage.list_dirs(storage.join(self.folder, "trials")))
        with ThreadPoolExecutor(THREADS) as pool:
            found = [each for each in pool.map(lambda place: _read(place, metric), folders) if each is not None]
        found.sort(key=lambda each: each[0].number)
        return [trial for trial, _ in found], {trial.number: pack for trial, pack in found}


def _read(place: str, metric: Metric) -> tuple[Trial, int] | None:
    begun = read_json(storage.join(place, "trial.json"), ("number", "pack", "params", "config"), DAMAGED)
    if begun is None:
        return None
    ended = read_if_sound(storage.join(place, "ended.json"), ("state",), "the trial goes on from its checkpoint") or {}
    try:
        trial = Trial(
            number=begun["number"],
            state=ended.get("state", "running"),
            kind=ended.get("kind", ""),
            reason=ended.get("reason", ""),
            params=begun["params"],
            seconds=ended.get("seconds", 0.0),
            config=begun["config"],
        )
        for figures in read_metrics(place, "eval"):
            trial = with_point(trial, point_of(figures), metric)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedDataError(f"the files of trial {place} are damaged ({error!r}): {DAMAGED}") from error
    return trial, int(begun["pack"])


def point_of(figures: Mapping[str, Any]) -> Point:
    """Return an evaluation from the figures that a run reports."""
    nats = [value for key, value in figures.items() if key.endswith("/nats") and value is not None]
    return Point(
        epoch=figures["epoch"],
        step=figures["step"],
        top1=figures["top1"],
        top5=figures["top5"],
        cross_entropy=_number(figures["cross_entropy"]),
        nats=sum(nats) if nats else None,
    )


def with_point(trial: Trial, point: Point, metric: Metric) -> Trial:
    """Return the trial after one more evaluation. If it already has one of that epoch (a trial that resumes from a
    checkpoint repeats some), the new one replaces it."""
    curve = (*(old for old in trial.curve if old.epoch < point.epoch), point)
    finite = [each for each in curve if math.isfinite(getattr(each, metric))]
    if not finite:
        return replace(trial, curve=curve)
    best = (max if direction(metric) == "maximize" else min)(finite, key=lambda each: getattr(each, metric))
    return replace(trial, curve=curve, score=getattr(best, metric), best_epoch=best.epoch)


def _number(value: float | None) -> float:
    """Return the number, with infinity for None: JSON has no infinity, so files have null in its place."""
    return math.inf if value is None else value
