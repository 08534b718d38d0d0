"""The command line of jobs/search.py, and the search that it starts: trials, finals and results.

Exit status: 0 done, 1 no usable trial, 2 bad input, 3 stopped (SIGTERM), 130 interrupted. Errors are one line on
standard error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mimkd_ray import console, storage
from mimkd_ray.cli import common
from mimkd_ray.cli.local_launch import pick_device
from mimkd_ray.cli.preflight import preflight
from mimkd_ray.cli.training import absolute, below_root
from mimkd_ray.config import Config, SearchJob
from mimkd_ray.config.search import search_job
from mimkd_ray.console import clock
from mimkd_ray.errors import Interrupted
from mimkd_ray.on_ray import environment
from mimkd_ray.run_lock import check_free, held
from mimkd_ray.search.driver import Search, claim, search_digest
from mimkd_ray.search.finals import Finals
from mimkd_ray.search.report.build_report import report_html
from mimkd_ray.search.run_trials import prepare, run_trials
from mimkd_ray.search.suggest import Space, find_spaces
from mimkd_ray.search.trial_folders import Ended, Planned
from mimkd_ray.search.trials import Final
from mimkd_ray.train.records import run_files

LINE_SECONDS = 10.0
"""Least seconds between two printed evaluations; the end of every trial is printed."""

PUBLISH_SECONDS, PUBLISH_SHARE = 10.0, 0.02
"""Least seconds between two updates of trials.parquet, best.json and report.html while trials run, and largest share of
the driver's time for them: a report of hundreds of trials takes seconds to draw."""


def main(
    recipes: Mapping[str, Callable[[], Config]],
    spaces: Mapping[str, Space],
    argv: Sequence[str] | None = None,
    program: str | None = None,
) -> int:
    """Run ``search.py [RECIPE] [--search.field value ...] [--field.path value ...]``; return the exit status."""
    program = program or sys.argv[0]
    jobs = {name: _as_search(recipe) for name, recipe in recipes.items()}

    def work() -> int:
        job = common.parse(jobs, next(iter(jobs)), sys.argv[1:] if argv is None else argv, program)
        return 0 if job is None else search(job, spaces)

    return common.guarded(program, work, "the same command goes on from the trials so far")


def _as_search(recipe: Callable[[], Config]) -> Callable[[], SearchJob]:
    def made() -> SearchJob:
        return search_job(recipe())

    made.__doc__ = recipe.__doc__
    return made


def search(job: SearchJob, spaces: Mapping[str, Space]) -> int:
    """Run a search to its end and write its results; return the exit status."""
    found = find_spaces(job.search.space, spaces)
    job = absolute(job)
    folder = below_root(job, f"search-{job.recipe}-{search_digest(job)[:8]}")
    check_free(folder)
    if job.run.overwrite:
        run_files.overwrite(folder)
    state = Search(job, folder, found)
    widest = state.widest()
    with console.phase("checking data, networks and places"):
        preflight(widest)
    with held(folder), console.phase(f"search of {job.search.algorithm}", said=False):
        claim(job, folder)
        console.line(opening(state))
        stopped = run_here(state, widest) if job.launch.backend == "local" else run_with_ray(state, widest)
    if stopped:
        over = sum(trial.state != "running" for trial in state.trials.values())
        raise Interrupted(f"asked to stop: {over} of {len(state.trials)} trials of {folder} have ended")
    if not state.ranked():
        failed = [f"trial {trial.number}: {trial.reason}" for trial in state.trials.values() if trial.reason]
        reasons = "; ".join(failed[:3]) or f"{state.over_budget() or 'none began'}"
        return common.fail(f"no trial of {folder} came to an evaluation: {reasons}", 1)
    return 0


def opening(state: Search) -> str:
    """Return the description of a search that is printed before it starts."""
    job, candidates = state.config, state.candidates
    known = sum(trial.state != "running" for trial in state.trials.values())
    return "\n".join(
        [
            f"search directory: {state.folder}" + (f" ({known} trials have ended before)" if known else ""),
            f"searching {', '.join(job.space)} by {job.algorithm}, scheduler {job.scheduler}, for the best "
            f"{job.metric} on {state.base.data.holdout:.0%} of the training rows",
            f"candidate pairs of the feature terms: {', '.join(candidates.feature) or 'none'}",
        ]
    )


class Shown:
    """A driver that prints progress and keeps the files of the search up to date."""

    def __init__(self, driver: Search | Finals, total: int, publish: Callable[[], Any]) -> None:
        self.driver, self.total, self.publish = driver, total, publish
        self.over = 0
        self._of_this_start = 0
        self._began = time.monotonic()
        self._line = self._next_publishing = 0.0

    def next(self) -> list[Planned]:
        """Return the driver's next trials, and print them."""
        planned = self.driver.next()
        for each in planned:
            text = ", ".join(f"{name} {_short(value)}" for name, value in each.params.items())
            console.line(f"{self.driver.label(each.number)}: {text}")
        return planned

    def place(self, number: int) -> str:
        """Return the driver's place of a trial."""
        return self.driver.place(number)

    def heard(self, number: int, figures: Mapping[str, Any], alone: bool = True) -> Ended | None:
        """Return the driver's decision; print a line from time to time."""
        if time.monotonic() - self._line > LINE_SECONDS:
            self._line = time.monotonic()
            console.line(f"{self.driver.label(number)}: epoch {figures['epoch']}, top-1 {figures['top1']:.2f} %")
        verdict = self.driver.heard(number, figures, alone)
        self._publish()
        return verdict

    def ended(self, number: int, ended: Ended, gpus: float = 0.0) -> bool:
        """Pass a trial's end to the driver, and print it."""
        if not self.driver.ended(number, ended, gpus):
            return False
        self.over += 1
        self._of_this_start += 1
        left = f"{self.over} of {self.total}" if self.total else f"{self.over}"
        spent = time.monotonic() - self._began
        each = spent / self._of_this_start
        ahead = f", {clock(each * (self.total - self.over))} left" if self.total > self.over else ""
        print(
            f"{self.driver.label(number)}: {self.ending(number, ended)}; {left} over in {clock(spent)}{ahead}",
            flush=True,
        )
        self._publish()
        return True

    def ending(self, number: int, ended: Ended) -> str:
        """Return the end of a trial in words."""
        if isinstance(self.driver, Finals):
            return " ".join(filter(None, [ended.state, ended.reason]))
        trial = self.driver.trials[number]
        score = f" with {self.driver.config.metric} {trial.score:.4g}" if trial.score is not None else ""
        why = f" ({trial.kind}: {trial.reason})" if trial.reason else ""
        return f"{trial.state}{score}{why}"

    def _publish(self) -> None:
        began = time.monotonic()
        if began >= self._next_publishing:
            self.publish()
            seconds = time.monotonic() - began
            self._next_publishing = time.monotonic() + max(PUBLISH_SECONDS, seconds / PUBLISH_SHARE)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_report(state: Search, finals: Sequence[Final] = ()) -> None:
    """Write report.html."""
    facts = {
        "recipe": state.job.recipe,
        "teacher": state.base.teacher.name,
        "student": state.base.student.name,
        "space": ", ".join(state.config.space),
        "algorithm": f"{state.config.algorithm}, scheduler {state.config.scheduler}",
        "held out": f"{state.base.data.holdout:.0%} of the training rows",
        "epochs of a trial": str(state.base.train.epochs),
        "hours": f"{state.spent()[0]:.2f}",
    }
    title = f"{state.base.teacher.name} -> {state.base.student.name}"
    html = report_html(list(state.trials.values()), state.config.metric, title, facts, finals or None)
    storage.write_bytes(storage.join(state.folder, "report.html"), html.encode())


def stages(state: Search, run: Callable[[Shown], bool]) -> bool:
    """Run trials, then finals; return True if stopped before the end. ``run`` runs the trials that a driver hands
    out."""

    def publish() -> None:
        state.publish()
        write_report(state)

    trials = Shown(state, state.config.trials, publish)
    trials.over = sum(trial.state != "running" for trial in state.trials.values())
    if run(trials):
        return True
    publish()
    finals = Finals(state)
    if finals.runs:
        names = ", ".join(str(number) for number in dict.fromkeys(trial for trial, _ in finals.runs))
        console.line(f"finalists: trials {names}, {state.config.seeds} seeds each")
        shown = Shown(finals, len(finals.runs), lambda: None)
        if run(shown):
            return True
        write_report(state, finals.publish())
    console.line(closing(state))
    return False


def closing(state: Search) -> str:
    """Return the results in words."""
    states = [trial.state for trial in state.trials.values()]
    counts = ", ".join(f"{states.count(each)} {each}" for each in ("completed", "stopped", "failed") if each in states)
    lines = [f"{len(states)} trials: {counts}; {state.spent()[0]:.2f} hours"]
    for trial in state.ranked()[:3]:
        text = ", ".join(f"{name} {_short(value)}" for name, value in trial.params.items())
        lines.append(f"trial {trial.number}: {state.config.metric} {trial.score:.4g}; {text}")
    if state.ranked():
        lines.append(f"best configuration: {storage.join(state.folder, 'best.json')} (jobs/ take it by --config)")
    lines.append(f"report: {storage.join(state.folder, 'report.html')}")
    return "\n".join(lines)


def run_here(state: Search, widest: Config) -> bool:
    """Run all trials in this process, one after the other, without Ray."""
    device = pick_device(state.job.launch, 0)
    prepare(widest, state.folder, device)

    class Stop(Exception):
        pass

    def run(driver: Shown) -> bool:
        while planned := driver.next():
            alone = len(planned) == 1
            verdicts: dict[int, Ended] = {}

            def tell(figures: Mapping[int, Mapping[str, Any]], alone: bool = alone, found: Any = verdicts) -> None:
                for number, value in figures.items():
                    verdict = driver.heard(number, value, alone)
                    if verdict is not None:
                        found[number] = verdict
                if found:
                    raise Stop

            places = {each.number: driver.place(each.number) for each in planned}
            try:
                ended = run_trials(state.config, planned, state.folder, places, device, tell)
            except Stop:
                ended = verdicts
            for number, each in ended.items():
                driver.ended(number, each)
        return False

    return stages(state, run)


def run_with_ray(state: Search, widest: Config) -> bool:
    """Run trials under Ray Tune, as many at the same time as fit in the cluster."""
    job = state.job
    environment.prepare(job.launch.address)
    from mimkd_ray.on_ray import tune_driver  # Ray takes seconds to import and reads its environment on import
    from mimkd_ray.on_ray.cluster import connect, disconnect
    from mimkd_ray.on_ray.node_capacity import Capacity
    from mimkd_ray.on_ray.search_trackers import trackers

    callbacks = trackers(job.search.loggers, f"mimkd-{job.recipe}")
    own = connect(job.launch.address, "--launch.address", log_to_driver=False)
    try:
        shape = tune_driver.shape_of(job, Capacity.of_cluster())
        console.line(shape.text())
        tune_driver.prepare_on_ray(widest, state.folder, shape)

        def run(driver: Shown) -> bool:
            return tune_driver.run_on_ray(driver, job, state.folder, shape, own, callbacks)

        return stages(state, run)
    finally:
        if own:
            disconnect()
