"""The summary of a search: report.html, lines for the terminal, and the hours that it took (clock.json)."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mimkd_ray import storage
from mimkd_ray.config import Config, SearchJob
from mimkd_ray.errors import UserError, count
from mimkd_ray.json_files import NUMBER, read_if_sound
from mimkd_ray.search.trial_files import Table
from mimkd_ray.search.trials import Final, Trial, value_text
from mimkd_ray.train.records.run_dir import write_json

CLOCK = "clock.json"
"""File of a search with what Clock keeps."""


ENDS = (200, 120)
"""Characters at the beginning and the end of a long reason that the terminal shows: what broke, and the remedy."""


class Clock:
    """clock.json: the hours of a search over all its starts, the name of the finals with which it has finished, and
    where it was begun."""

    def __init__(self, folder: str) -> None:
        self.folder, self.url = folder, storage.join(folder, CLOCK)
        known = read_if_sound(self.url, {"seconds": NUMBER}, "hours count from 0") or {}
        self.finished: str | None = known.get("finished")
        self._home: str = known.get("folder", folder)
        self._before: float = known.get("seconds", 0.0)
        self._began = time.monotonic()

    @property
    def hours(self) -> float:
        """Hours so far."""
        return (self._before + time.monotonic() - self._began) / 3600

    def check_place(self) -> None:
        """Raise UserError for a search that was moved: Ray Tune's state has the place for trials that are to come."""
        here, home = storage.local_path(self.folder), storage.local_path(self._home)
        if self._home != self.folder and (
            storage.is_remote(self._home) or not home.exists() or not here.samefile(home)
        ):
            raise UserError(
                f"{self.folder} was begun as {self._home}, where Ray Tune's state would go on: move it back there, "
                "or begin anew with --run.overwrite true"
            )

    def save(self, finished: str | None = None) -> None:
        """Write the file."""
        write_json(self.url, {"seconds": 3600 * self.hours, "finished": finished, "folder": self._home})


def write_report(job: SearchJob, base: Config, table: Table, hours: float, finals: Sequence[Final] = ()) -> None:
    """Write report.html."""
    from mimkd_ray.search.report.build_report import report_html  # Optuna and Plotly take seconds to import

    facts = {
        "recipe": job.recipe,
        "teacher": base.teacher.name,
        "student": base.student.name,
        "space": ", ".join(job.search.space),
        "algorithm": f"{job.search.algorithm}, scheduler {job.search.scheduler}",
        "held out": f"{base.data.holdout:.0%} of the training rows",
        "epochs of a trial": str(base.train.epochs),
        "hours": f"{hours:.2f}",
    }
    title = f"{base.teacher.name} -> {base.student.name}"
    html = report_html(table.trials(), job.search.metric, title, facts, finals or None)
    storage.write_bytes(storage.join(table.folder, "report.html"), html.encode())


def ending(trial: Trial, metric: str) -> str:
    """Return the end of a trial in words."""
    score = f" with {metric} {trial.score:.4g}" if trial.score is not None else ""
    return f"{trial.state}{score}" + (f" ({trial.kind}: {brief(trial.reason)})" if trial.reason else "")


def brief(reason: str) -> str:
    """Return a reason for the terminal: without its middle, such as 64 images, if it is long. The table has all."""
    return reason if len(reason) <= sum(ENDS) + 5 else f"{reason[: ENDS[0]]} ... {reason[-ENDS[1] :]}"


def closing(table: Table, hours: float) -> str:
    """Return the results in words, of a search with a best trial, and the command that trains with its config."""
    trials = table.trials()
    states = [trial.state for trial in trials]
    counts = ", ".join(f"{states.count(each)} {each}" for each in ("completed", "stopped", "failed") if each in states)
    lines = [f"{count(len(states), 'trial')}: {counts}; {hours:.2f} hours"]
    for trial in table.ranked()[:3]:
        lines.append(f"trial {trial.number}: {table.metric} {trial.score:.4g}; {values(trial.params)}")
    best = storage.join(table.folder, "best.json")
    lines += [f"best configuration: {best}", f"report: {storage.join(table.folder, 'report.html')}"]
    lines += ["next:", f"  python -m mimkd_ray train --config {shlex.quote(best)}"]
    return "\n".join(lines)


def values(params: Mapping[str, Any]) -> str:
    """Return hyperparameters in words."""
    return ", ".join(f"{name} {value_text(value)}" for name, value in params.items())
