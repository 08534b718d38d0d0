"""The trials of a search at rest: trials/0007.json for each, trials.parquet and best.json for all.

All are plain JSON or Parquet: nothing of ours is unpickled. Only the driver of the search writes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from mimkd_ray import storage
from mimkd_ray.config import SearchJob
from mimkd_ray.config.form.json_form import to_dict
from mimkd_ray.config.jobs.search import Metric
from mimkd_ray.errors import DamagedDataError
from mimkd_ray.json_files import NUMBER, Keys, read_json
from mimkd_ray.search.configs import Made, final_config
from mimkd_ray.search.trials import STATES, Point, State, Trial, direction, ranked, write_trials
from mimkd_ray.train.records.run_dir import write_json

FINALS = "finals.json"
"""File with the results of the finalists, the best of which is then in best.json."""

OR_NONE = (*NUMBER, type(None))
KINDS: Keys = {
    **dict.fromkeys(("id", "state", "kind", "reason"), str),
    **dict.fromkeys(("params", "config"), dict),
    **dict.fromkeys(("score", "best_epoch"), OR_NONE),
    "number": int,
    "seconds": NUMBER,
    "curve": list,
}
"""Types in the file of a trial."""

DAMAGED = "remove it, and the table goes on without that trial"


class Table:
    """The trials by the names that Ray Tune gives them; those of a pack by its name and their index in it."""

    def __init__(self, folder: str, metric: Metric) -> None:
        """Read the trials of earlier starts."""
        self.folder, self.metric = folder, metric
        self.rows: dict[str, Trial] = {}
        files = storage.list_files(storage.join(folder, "trials"), ".json")
        with ThreadPoolExecutor(storage.THREADS) as pool:
            found = [each for each in pool.map(_read, files) if each is not None]
        self.rows |= sorted(found, key=lambda each: each[1].number)

    def keep(self, names: Collection[str]) -> None:
        """Forget the trials that Ray Tune does not know: a kill came before its state was saved."""
        for name in [name for name in self.rows if name.partition("/")[0] not in names]:
            storage.remove_file(self._url(self.rows.pop(name).number))

    def begin(self, name: str, made: Made | None, params: Mapping[str, Any]) -> Trial:
        """Note that a trial has begun, or goes on, and return it. ``made`` is None where there is no such config."""
        number = 1 + max((row.number for row in self.rows.values()), default=-1)
        trial = self.rows.get(name) or Trial(number=number, state="running", params={})
        own = {"params": made.params, "config": to_dict(made.config)} if made else {"params": params, "config": {}}
        return self._put(name, replace(trial, state="running", kind="", reason="", **own))

    def heard(self, name: str, figures: Mapping[str, Any]) -> None:
        """Note an evaluation."""
        trial = with_point(self.rows[name], point_of(figures), self.metric)
        lived = _schedule(json.loads(figures.get("schedule", "[]")))
        seconds = figures.get("time_total_s", trial.seconds)
        self._put(name, replace(trial, seconds=seconds, schedule=lived or trial.schedule))

    def go_back(self, name: str, made: Made) -> None:
        """Forget the newest values of a member of a population, which no epoch was trained with; ``made`` is of those
        before."""
        trial = self.rows[name]
        config = to_dict(made.config)
        self._put(name, replace(trial, schedule=trial.schedule[:-1], params=made.params, config=config))

    def ended(self, name: str, state: State, kind: str = "", reason: str = "", seconds: float = 0.0) -> None:
        """Note a trial's end, ``seconds`` after its start if it has taken longer than its evaluations told."""
        trial = self.rows[name]
        if state == "completed" and trial.score is None:
            state, kind, reason = "failed", "non-finite", f"no finite {self.metric}"
        self._put(name, replace(trial, state=state, kind=kind, reason=reason, seconds=max(seconds, trial.seconds)))

    def _put(self, name: str, trial: Trial) -> Trial:
        """Write a trial at once: Ray Tune may know of this evaluation after a kill, and does not tell of it again."""
        self.rows[name] = trial
        write_json(self._url(trial.number), {"id": name, **asdict(trial)})
        return trial

    def _url(self, number: int) -> str:
        return storage.join(self.folder, "trials", f"{number:04d}.json")

    def trials(self) -> list[Trial]:
        """Return all trials by number."""
        return sorted(self.rows.values(), key=lambda trial: trial.number)

    def ranked(self) -> list[Trial]:
        """Return the trials that can be trained with, best first."""
        return ranked(self.trials(), self.metric)

    def publish(self, job: SearchJob) -> None:
        """Write trials.parquet, and best.json if there is a trial to train with and no finalist has won."""
        write_trials(storage.join(self.folder, "trials.parquet"), self.trials(), self.metric)
        best = self.ranked()
        if best and not (job.search.finalists and storage.exists(storage.join(self.folder, FINALS))):
            write_json(storage.join(self.folder, "best.json"), final_config(job, best[0].config))


def _read(url: str) -> tuple[str, Trial] | None:
    value = read_json(url, KINDS, DAMAGED)
    if value is None:
        return None
    name, curve, lived = value.pop("id"), value.pop("curve"), value.pop("schedule", ())
    try:
        if value["state"] not in STATES:
            raise ValueError(value["state"])
        for point in curve:
            point["cross_entropy"] = _number(point["cross_entropy"])
            point.pop("seconds", None)  # which earlier versions wrote
            if not all(isinstance(each, OR_NONE) for each in point.values()):
                raise TypeError(f"curve has {point}")
        return name, Trial(**value, curve=tuple(Point(**point) for point in curve), schedule=_schedule(lived))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedDataError(f"{url} is damaged, or of another version ({error!r}): {DAMAGED}") from error


def _schedule(read: Iterable[Any]) -> tuple[tuple[int, dict[str, Any]], ...]:
    return tuple((int(epoch), dict(params)) for epoch, params in read)


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
        knn=figures.get("knn"),
    )


def with_point(trial: Trial, point: Point, metric: Metric) -> Trial:
    """Return the trial after one more evaluation. If it already has one of that epoch (a trial that resumes from a
    checkpoint repeats some), the new one replaces it."""
    curve = (*(old for old in trial.curve if old.epoch < point.epoch), point)
    finite = [each for each in curve if math.isfinite(each.value(metric))]
    if not finite:
        return replace(trial, curve=curve, score=None, best_epoch=None)
    best = (max if direction(metric) == "maximize" else min)(finite, key=lambda each: each.value(metric))
    return replace(trial, curve=curve, score=best.value(metric), best_epoch=best.epoch)


def _number(value: float | None) -> float:
    """Return the number, with infinity for None: JSON has no infinity, so files have null in its place."""
    return math.inf if value is None else value
