"""The callback by which Ray Tune's trials become the rows of a search's table; it is the search's stopper too."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray import tune

from mimkd_ray import console, storage
from mimkd_ray.config import SearchJob
from mimkd_ray.config.form.json_form import from_dict
from mimkd_ray.console import Status
from mimkd_ray.errors import UserError
from mimkd_ray.json_files import read_json
from mimkd_ray.search.configs import Made, TrialConfigs
from mimkd_ray.search.run_trials import REASON
from mimkd_ray.search.summary import Clock, ending, values, write_report
from mimkd_ray.search.trial_files import Table
from mimkd_ray.search.trials import Point

LINE_SECONDS = 10.0
"""Least seconds between two printed evaluations; the end of every trial is printed."""

PUBLISH_SECONDS, PUBLISH_SHARE = 10.0, 0.02
"""Least seconds between two updates of trials.parquet, best.json and report.html while trials run, and largest share of
the driver's time for them: a report of hundreds of trials takes seconds to draw."""

LOW_ON_MEMORY = ("OutOfMemoryError", "low on memory")
"""Parts of Ray's message about a process that its memory monitor has killed."""


class FinalsCounter(tune.Callback):
    """Tells how many of the finalists' runs are over, as a part of the phase ``what``."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total = what, total

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A run begins or goes on."""
        self._show([each for each in trials if each.is_finished()])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A run is over; Tune changes its status after this."""
        self._show([each for each in trials if each.is_finished() or each is trial])

    on_trial_error = on_trial_complete

    def _show(self, over: list[Any]) -> None:
        console.show(Status(self.what, len(over), self.total, "runs"))


class Journal(tune.Callback, tune.Stopper):
    """Writes the table, the report and the terminal's lines, and ends the search when its budget is used up. Tune
    pickles it without what it has read: a restored one reads the table anew. The restored stopper is another object
    than the restored callback, so each hears for itself what trials take."""

    def __init__(self, job: SearchJob, folder: str, configs: TrialConfigs, gpus: float, total: int) -> None:
        """``gpus``: those of a trial. ``total``: the number of trials, 0: as many as the budget allows."""
        self.job, self.folder, self.configs, self.gpus, self._total = job, folder, configs, gpus, total
        self.seconds: dict[str, float] = {}
        self._table: Table | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_table": None}

    def open(self) -> Table:
        """Read the table, and the limits of this start."""
        self.job = from_dict(SearchJob, read_json(storage.join(self.folder, "config.json")) or {})
        self._table = Table(self.folder, self.job.search.metric)
        self.clock = Clock(self.folder)
        for name, row in self._table.rows.items():
            self.spent(name.partition("/")[0], row.seconds)
        self._known = False
        self._line = self._next_publishing = 0.0
        return self._table

    @property
    def table(self) -> Table:
        """The table, opened."""
        return self._table or self.open()

    def spent(self, trial: str, seconds: float) -> None:
        """Note the seconds that a trial (pack) has taken so far."""
        self.seconds[trial] = max(seconds, self.seconds.get(trial, 0.0))

    def over_budget(self) -> str:
        """Return a message about the budget that is used up, "" if none is."""
        if self._table is None:
            self.open()  # the clock too
        used = {"hours": self.clock.hours, "gpu_hours": sum(self.seconds.values()) * self.gpus / 3600}
        for name, hours in used.items():
            limit = getattr(self.job.search, name)
            if limit and hours >= limit:
                return f"the budget is used up: {hours:.2f} of {limit:g} {name}"
        return ""

    # What Tune calls

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Note what a trial has taken, and return False: no trial is stopped alone."""
        self.spent(trial_id, result["time_total_s"])
        return False

    def stop_all(self) -> bool:
        """Return whether the budget is used up."""
        return bool(self.over_budget())

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Forget rows that Tune does not know, and tell how far an earlier start has come, once."""
        table = self.table
        if not self._known:
            self._known = True
            table.keep({trial.trial_id for trial in trials})
            self._show()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial begins or goes on, perhaps with other values."""
        if "pack" not in trial.config:
            self._begin(trial.trial_id, trial.config)

    def _begin(self, name: str, params: Mapping[str, Any]) -> None:
        made: Made | None = None
        with suppress(UserError):  # the trial fails with it
            made = self.configs(params)
        row = self.table.rows.get(name)
        if row is None or row.state != "running" or (made and row.params != made.params):
            row = self.table.begin(name, made, params)
            console.line(f"trial {row.number}: {values(row.params)}")
            self._show()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """An evaluation, or the failure of a trial."""
        self.spent(trial.trial_id, result["time_total_s"])
        if "pack" in trial.config:
            self._heard_pack(trial.trial_id, result)
        elif "failed" in result:
            self._ended(trial.trial_id, "failed", result["failed"], result["reason"])
        else:
            self._heard(trial.trial_id, result)
        self._publish()

    def _heard(self, name: str, figures: Mapping[str, Any]) -> None:
        if self.table.rows[name].state != "running":
            return
        self.table.heard(name, figures)
        epochs = [epoch for epoch, _ in self.table.rows[name].schedule]
        if len(epochs) > 1 and epochs[-1] == epochs[-2]:  # Tune moves members after their last epoch too
            self.table.go_back(name, self.configs(self.table.rows[name].schedule[-2][1]))
        if time.monotonic() - self._line > LINE_SECONDS:
            self._line = time.monotonic()
            row = self.table.rows[name]
            console.line(f"trial {row.number}: epoch {figures['epoch']}, {self._scored(row.curve[-1])}")

    def _scored(self, point: Point) -> str:
        """Return an evaluation in words."""
        value = point.value(self.table.metric)
        if self.table.metric == "cross_entropy":
            return f"cross-entropy {value:.4g}"
        return f"{'k-NN ' if self.table.metric == 'knn' else ''}top-1 {value:.2f} %"

    def _show(self) -> None:
        """Tell how far the search is, from now until something else goes on."""
        states = [row.state for row in self.table.rows.values()]
        best = [f"best {self.table.metric} {row.score:.4g}" for row in self.table.ranked()[:1]]
        figures = ", ".join([f"{states.count('running')} running", *best])
        over = len(states) - states.count("running")
        console.show(Status(f"search of {self.job.search.algorithm}", over, self._total, "trials", figures=figures))

    def _heard_pack(self, name: str, result: Mapping[str, Any]) -> None:
        drawn = json.loads(result.get("drawn", "[]"))
        for at, params in enumerate(drawn):
            if f"{name}/{at}" not in self.table.rows:
                self._begin(f"{name}/{at}", params)
        if "failed" in result:
            for at in range(len(drawn)):
                self._ended(f"{name}/{at}", "failed", result["failed"], result["reason"])
            return
        told = json.loads(result["members"])
        for at, figures in told["figures"].items():
            self._heard(f"{name}/{at}", {**figures, "time_total_s": result["time_total_s"]})
        for at, (kind, reason) in told["ended"].items():
            self._ended(f"{name}/{at}", {"early": "stopped", "": "completed"}.get(kind, "failed"), kind, reason)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has come to its end, or was stopped by the scheduler or the budget."""
        for name in self._names(trial):
            curve = self.table.rows[name].curve
            last = curve[-1].epoch if curve else 0
            if last >= self.configs.base.train.epochs:
                self._ended(name, "completed")
            elif over := self.over_budget():
                self._ended(name, "stopped", "budget", over)
            else:
                self._ended(name, "stopped", "early", f"stopped by {self.job.search.scheduler} after epoch {last}")
        self._publish()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's process was lost more often than it may be."""
        text = Path(trial.error_file).read_text() if trial.error_file and Path(trial.error_file).exists() else ""
        kind = "out of memory" if any(words in text for words in LOW_ON_MEMORY) else "lost"
        said = " ".join(text.strip().split("\n")[-1].split())[:REASON] or "its process is gone"
        for name in self._names(trial):
            self._ended(name, "failed", kind, said)

    def _names(self, trial: Any) -> list[str]:
        return [name for name in self.table.rows if name.partition("/")[0] == trial.trial_id]

    def _ended(self, name: str, state: Any, kind: str = "", reason: str = "") -> None:
        if self.table.rows[name].state != "running":
            return
        self.table.ended(name, state, kind, reason, self.seconds.get(name.partition("/")[0], 0.0))
        row = self.table.rows[name]
        over = sum(each.state != "running" for each in self.table.rows.values())
        left = f" of {self._total}" if self._total else ""
        hours = self.clock.hours
        console.line(f"trial {row.number}: {ending(row, self.table.metric)}; {over}{left} over in {hours:.2f} h")
        self._show()

    def _publish(self) -> None:
        began = time.monotonic()
        if began >= self._next_publishing:
            self.publish()
            seconds = time.monotonic() - began
            self._next_publishing = time.monotonic() + max(PUBLISH_SECONDS, seconds / PUBLISH_SHARE)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """The trials are over, or Tune was interrupted."""
        for trial in trials:
            if trial.status == "ERROR":  # Tune does not tell of one that it could not begin again
                self.on_trial_error(0, trials, trial)
        self.publish()

    def publish(self) -> None:
        """Bring the search's files up to date."""
        self.table.publish(self.job)
        self.clock.save()
        write_report(self.job, self.configs.base, self.table, self.clock.hours)
