"""What a search has at rest: one folder for each trial, below the search's own.

    config.json                 the search job
    trials/0007/trial.json      number, pack, hyperparameters; written when the trial is chosen
    trials/0007/...             the trial's run directory: config, metrics, checkpoints, best student
    trials/0007/ended.json      how and why it ended; written last
    trials.parquet  best.json  report.html

A trial with the first file and without the last one is unfinished, and goes on after a restart. Plain JSON throughout,
so a search is resumed without unpickling anything. Only the driver of the search writes these files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mimkd_ray import storage
from mimkd_ray.config.search import Metric
from mimkd_ray.search.trials import Point, Trial, Value, direction
from mimkd_ray.train.records.run_dir import read_json, read_metrics, write_json

THREADS = 16
"""Trials are read from object storage in parallel."""

Ending = Literal["", "early", "budget", "out of memory", "non-finite", "error", "lost"]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a trial ended."""

    state: Literal["completed", "stopped", "failed"]
    kind: Ending = ""
    reason: str = ""
    seconds: float = 0.0
    """Of its last start."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Seconds of the stages before its first step."""


@dataclass(frozen=True)
class Planned:
    """A trial that is to run: new, or from before a restart."""

    number: int
    pack: int
    """The first number of its pack; its own where it is alone."""
    params: Mapping[str, Value]
    config: Mapping[str, Any]
    """The whole config, as JSON."""


class Ledger:
    """Writes and reads the folders of trials."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def place(self, number: int) -> str:
        """The run directory of a trial."""
        return storage.join(self.folder, "trials", f"{number:04d}")

    def begin(self, planned: Planned) -> None:
        """Note a new trial."""
        value = {"number": planned.number, "pack": planned.pack, "params": dict(planned.params)}
        write_json(storage.join(self.place(planned.number), "trial.json"), value | {"config": planned.config})

    def end(self, number: int, ended: Ended) -> None:
        """Note how a trial ended."""
        value = {"state": ended.state, "kind": ended.kind, "reason": ended.reason, "seconds": ended.seconds}
        write_json(storage.join(self.place(number), "ended.json"), value | {"details": dict(ended.details)})

    def read(self, metric: Metric) -> tuple[list[Trial], dict[int, int]]:
        """All trials by number, with their curves, and their packs."""
        folders = sorted(storage.list_dirs(storage.join(self.folder, "trials")))
        with ThreadPoolExecutor(THREADS) as pool:
            found = [each for each in pool.map(lambda place: _read(place, metric), folders) if each is not None]
        found.sort(key=lambda each: each[0].number)
        return [trial for trial, _ in found], {trial.number: pack for trial, pack in found}


def _read(place: str, metric: Metric) -> tuple[Trial, int] | None:
    begun = read_json(storage.join(place, "trial.json"))
    if begun is None:
        return None
    ended = read_json(storage.join(place, "ended.json")) or {}
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
    return trial, begun["pack"]


def point_of(figures: Mapping[str, Any]) -> Point:
    """An evaluation, from what a run says of it."""
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
    """The trial after one more evaluation; one that it has already (a trial that went on from a checkpoint repeats
    some) takes the old one's place."""
    curve = (*(old for old in trial.curve if old.epoch < point.epoch), point)
    finite = [each for each in curve if math.isfinite(getattr(each, metric))]
    if not finite:
        return replace(trial, curve=curve)
    best = (max if direction(metric) == "maximize" else min)(finite, key=lambda each: getattr(each, metric))
    return replace(trial, curve=curve, score=getattr(best, metric), best_epoch=best.epoch)


def _number(value: float | None) -> float:
    """JSON knows no infinity: files have null in its place."""
    return math.inf if value is None else value
