"""The state of a search in its driver: the next trial, early stopping, the budget, and the results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mimkd_ray import storage
from mimkd_ray.config import CompareConfig, Config, RunConfig, SearchJob
from mimkd_ray.config.digest import differences, refuse_changes, training_part
from mimkd_ray.config.json_form import to_dict
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.json_files import read_if_sound, read_json
from mimkd_ray.search.optuna_study import Study
from mimkd_ray.search.suggest import Space, Suggest, compose
from mimkd_ray.search.tap_candidates import find_candidates, widest
from mimkd_ray.search.trial_folders import Ended, Ledger, Planned, point_of, with_point
from mimkd_ray.search.trials import Trial, ranked, write_trials
from mimkd_ray.train.records.outcomes import DAMAGED_CONFIG
from mimkd_ray.train.records.run_dir import write_json
from mimkd_ray.train.teacher_head import teacher_head

MAY_CHANGE = ("trials", "hours", "gpu_hours", "concurrent", "retries", "finalists", "seeds", "loggers")
"""Fields of the search's config that may differ when it is resumed: budgets, and how trials run."""


def trial_config(job: SearchJob) -> Config:
    """Return the config that all trials share: the recipe with a held-out part, views of one seed, and the trial's
    length, to which a step schedule and its warm-up are shortened."""
    config = plain(job)
    epochs = job.search.epochs or config.train.epochs
    share = epochs / config.train.epochs
    milestones = {round(epoch * share) for epoch in config.optim.milestones}  # several may round to the same epoch
    optim = replace(
        config.optim,
        milestones=tuple(sorted(milestones - {0})),
        warmup_epochs=config.optim.warmup_epochs * share,
    )
    return replace(
        config,
        data=replace(config.data, holdout=config.data.holdout or job.search.holdout, view_seed=config.view_seed),
        train=replace(config.train, epochs=epochs, eval_every=config.train.eval_every or 1),
        optim=optim if share != 1 else config.optim,
        launch=replace(config.launch, workers=job.search.workers),
        run=RunConfig(keep_checkpoints=2, checkpoint_minutes=config.run.checkpoint_minutes, keep_best=True),
    )


def final_config(job: SearchJob, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config to train with through `jobs/`: the search's choice with the recipe's own data, length and
    schedule, in a run directory of its own.

    ``chosen`` is a trial's config; every field that differs from the config shared by all trials is part of the choice.
    """
    own = plain(job)
    own = replace(own, run=replace(own.run, name="", overwrite=False))  # those belong to the search
    return _with_changes(to_dict(own), to_dict(trial_config(job)), chosen)


def plain(job: SearchJob) -> Config:
    """Return the job without its search."""
    return Config(**{f.name: getattr(job, f.name) for f in dataclasses.fields(Config)} | {"compare": CompareConfig()})


def _with_changes(target: Mapping[str, Any], shared: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    changed = dict(target)
    for key, value in chosen.items():
        if isinstance(value, Mapping):
            changed[key] = _with_changes(target[key], shared[key], value)
        elif value != shared[key]:
            changed[key] = value
    return changed


class Search:
    """The state of a search, rebuilt from its folder at each start. Only one thread of one process, the driver, uses
    it."""

    def __init__(self, job: SearchJob, folder: str, spaces: list[Space]) -> None:
        """Open the folder of a search. Raises UserError if it holds a search that differs in more than its budget."""
        self.job, self.config, self.folder = job, job.search, folder
        self.base = trial_config(job)
        data = open_data(self.base.data)
        of_teacher = teacher_head(self.base, data).count
        self.candidates = find_candidates(self.base, data.num_classes, of_teacher)
        self.build: Callable[[Suggest], Config] = compose(spaces, self.base, self.candidates)
        begun_as(job, folder)
        self.ledger = Ledger(folder)
        known, self.packs = self.ledger.read(self.config.metric)
        self.trials: dict[int, Trial] = {trial.number: trial for trial in known}
        self.study = Study(self.config, self.build, known)
        self._unfinished = self._packs_to_finish()
        self._clock = read_if_sound(
            storage.join(folder, "clock.json"), ("seconds", "gpu_seconds"), "hours count from 0"
        ) or {"seconds": 0.0, "gpu_seconds": 0.0}
        self._began = time.monotonic()
        self._running: dict[int, float] = {}

    def widest(self) -> Config:
        """Return a config that reads everything of the teacher that any trial may read."""
        return widest(self.build, self.candidates)

    def _packs_to_finish(self) -> list[list[int]]:
        """Return the packs that have unfinished trials, with all their members."""
        open_packs = {self.packs[number] for number, trial in self.trials.items() if trial.state == "running"}
        return [[number for number, pack in self.packs.items() if pack == first] for first in sorted(open_packs)]

    def place(self, number: int) -> str:
        """Return the run directory of a trial."""
        return self.ledger.place(number)

    def label(self, number: int) -> str:
        """Return the name of a trial for display."""
        return f"trial {number}"

    # Trials to run

    def next(self) -> list[Planned]:
        """Return the next trial or pack of trials, empty if there is none left. Unfinished ones come first, if any
        budget is left."""
        if self.over_budget():
            return []
        if self._unfinished:
            numbers = self._unfinished.pop(0)
            return self._start([self._planned(number) for number in numbers])
        count = self.config.pack
        if self.config.trials:
            count = min(count, self.config.trials - len(self.trials))
        first = max(self.trials, default=-1) + 1  # not their count: a folder may be missing
        planned: list[Planned] = []
        for number in range(first, first + count):
            asked = self.study.ask(number)
            if asked is None:
                break
            planned.append(Planned(number, first, asked.params, to_dict(asked.config)))
        for each in planned:
            self.ledger.begin(each)
            self.packs[each.number] = first
            self.trials[each.number] = Trial(
                number=each.number, state="running", params=each.params, config=each.config
            )
        return self._start(planned)

    def _planned(self, number: int) -> Planned:
        trial = self.trials[number]
        return Planned(number, self.packs[number], trial.params, trial.config)

    def _start(self, planned: list[Planned]) -> list[Planned]:
        self._running |= {each.number: time.monotonic() for each in planned}
        return planned

    def spent(self) -> tuple[float, float]:
        """Return the hours of the search, and the GPU-hours of its finished trials, over all its starts."""
        seconds = self._clock["seconds"] + time.monotonic() - self._began
        return seconds / 3600, self._clock["gpu_seconds"] / 3600

    def over_budget(self) -> str:
        """Return a message about the budget that is used up, "" if none is."""
        hours, gpu_hours = self.spent()
        for name, limit, used in (("hours", self.config.hours, hours), ("gpu_hours", self.config.gpu_hours, gpu_hours)):
            if limit and used >= limit:
                return f"the budget is used up: {used:.2f} of {limit:g} {name}"
        return ""

    def heard(self, number: int, figures: Mapping[str, Any], alone: bool = True) -> Ended | None:
        """Record an evaluation; return how the trial is to end if it must stop, because it is behind or the budget is
        used up.

        ``alone``: False in a pack, which does its own halving.
        """
        trial = self.trials[number]
        if trial.state != "running":
            return None  # it was asked to stop, and some of its workers had not stopped yet
        point = point_of(figures)
        again = any(old.epoch == point.epoch for old in trial.curve)
        trial = self.trials[number] = with_point(trial, point, self.config.metric)
        behind = not again and self.study.report(number, point.epoch, getattr(point, self.config.metric))
        if behind and alone:
            return Ended(state="stopped", kind="early", reason=self.behind(number))
        over = self.over_budget()
        return Ended(state="stopped", kind="budget", reason=over) if over else None

    def behind(self, number: int) -> str:
        """Return the reason for which a trial is stopped early."""
        trial, metric = self.trials[number], self.config.metric
        point = trial.curve[-1]
        return (
            f"{metric} {getattr(point, metric):.4g} at epoch {point.epoch}: one trial in {self.config.reduction} goes "
            "on past this rung"
        )

    def ended(self, number: int, ended: Ended, gpus: float = 0.0) -> bool:
        """Record a trial's end; return whether it was still running. A trial of several workers ends twice, when it is
        asked to stop and when it has stopped, and members of a pack that resumes after a kill may have ended before it.
        """
        trial = self.trials[number]
        began = self._running.pop(number, None)
        if trial.state != "running":
            return False
        if not ended.seconds and began is not None:
            ended = replace(ended, seconds=time.monotonic() - began)
        if ended.state == "completed" and trial.score is None:
            ended = replace(ended, state="failed", kind="non-finite", reason=f"no finite {self.config.metric}")
        self.ledger.end(number, ended)
        self.trials[number] = replace(
            trial, state=ended.state, kind=ended.kind, reason=ended.reason, seconds=ended.seconds
        )
        self.study.tell(number, ended.state, trial.score)
        members = sum(pack == self.packs[number] for pack in self.packs.values())
        self._clock["gpu_seconds"] += ended.seconds * gpus / members
        hours, _ = self.spent()
        write_json(storage.join(self.folder, "clock.json"), self._clock | {"seconds": hours * 3600})
        return True

    # Results

    def ranked(self) -> list[Trial]:
        """Return the trials that can be trained with, best first."""
        return ranked(list(self.trials.values()), self.config.metric)

    def publish(self) -> None:
        """Write trials.parquet, and best.json if there is a trial to train with."""
        write_trials(storage.join(self.folder, "trials.parquet"), list(self.trials.values()), self.config.metric)
        best = self.ranked()
        if best:
            write_json(storage.join(self.folder, "best.json"), final_config(self.job, best[0].config))


def claim(job: SearchJob, folder: str) -> None:
    """Write the search's config.json, once everything is checked. Raises UserError as `begun_as` does."""
    begun_as(job, folder)
    write_json(storage.join(folder, "config.json"), to_dict(job))


def begun_as(job: SearchJob, folder: str) -> None:
    """Raise UserError for a folder that was begun with another search."""
    old = read_json(storage.join(folder, "config.json"), ("search",), DAMAGED_CONFIG)
    if old is not None:
        refuse_changes(folder, differences(_lasting(old), _lasting(to_dict(job))))


def _lasting(value: Mapping[str, Any]) -> dict[str, Any]:
    kept = training_part({name: fields for name, fields in value.items() if name != "search"})
    search = {name: item for name, item in value["search"].items() if name not in MAY_CHANGE}
    return json.loads(json.dumps(kept | {"search": search}))


def search_digest(job: SearchJob) -> str:
    """Return the hex digest of a search's lasting fields. It names the folder, so that the same command finds it
    again."""
    return hashlib.sha256(json.dumps(_lasting(to_dict(job)), sort_keys=True).encode()).hexdigest()
