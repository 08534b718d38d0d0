"""A search under Ray Tune: Tune places trials and restarts lost ones; search/ decides which run and which stop.

Tune's own experiment state is deleted: the trials' folders are the only state, so a restart unpickles nothing.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from mimkd_ray.config import Config, SearchJob
from mimkd_ray.config.json_form import to_dict
from mimkd_ray.errors import UserError
from mimkd_ray.local_files import scratch_folder
from mimkd_ray.on_ray.node_capacity import Capacity
from mimkd_ray.on_ray.trial_actor import ask_to_stop, payload, prepare_remotely, trainable
from mimkd_ray.search.run_trials import REASON
from mimkd_ray.search.trial_folders import Ended, Ending, Planned
from mimkd_ray.secret_urls import Carried

HEAD_SHARE = 0.001
"""Share of the head node's own resource for the process that watches a trial of several workers. There it takes no CPU
from the workers that it waits for, and outlives nodes that come and go."""

LOW_ON_MEMORY = ("OutOfMemoryError", "low on memory")
"""Parts of Ray's message about a process that its memory monitor has killed."""


class Driver(Protocol):
    """The source of trials: a search, or its finals."""

    def next(self) -> list[Planned]: ...

    def place(self, number: int) -> str: ...

    def heard(self, number: int, figures: Mapping[str, Any], alone: bool = True) -> Ended | None: ...

    def ended(self, number: int, ended: Ended, gpus: float = 0.0) -> bool: ...


class Shape(NamedTuple):
    """The resources of a trial, and the number of trials at the same time."""

    workers: int
    cpus: float
    gpus: float
    concurrent: int

    def bundles(self) -> tune.PlacementGroupFactory:
        """Return the resources of the trial's own process."""
        if self.workers > 1:
            return tune.PlacementGroupFactory([{"node:__internal_head__": HEAD_SHARE}])
        own = {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}
        return tune.PlacementGroupFactory([own])

    def text(self) -> str:
        """Return the resources in words."""
        each = f"{self.cpus:g} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")
        whole = f"{self.workers} workers with {each} each" if self.workers > 1 else each
        return f"{self.concurrent} at a time, {whole} a trial"


def shape_of(job: SearchJob, has: Capacity) -> Shape:
    """Return the resources of a trial and the number of trials at the same time, for a cluster of this capacity. Raises
    UserError if not even one fits: Tune would wait for ever."""
    search, launch = job.search, job.launch
    workers = search.workers
    use_gpu = launch.gpu == "on" or (launch.gpu == "auto" and has.gpus > 0)
    gpu = (search.gpus_per_trial or 1.0) if use_gpu else 0.0
    if workers > 1:
        gpu = 1.0 if use_gpu else 0.0
        cpu: float = launch.cpus_per_worker or (has.cpus_per_gpu() if use_gpu else 1)
    else:
        cpu = search.cpus_per_trial or (max(1, math.floor(has.cpus_per_gpu() * gpu)) if use_gpu else 1)
    fit = has.room(cpu, gpu) // workers
    if fit < 1 and not search.concurrent:
        raise UserError(
            f"a trial takes {workers * cpu:g} CPUs and {workers * gpu:g} GPUs, and the cluster has {has.cpus} and "
            f"{has.gpus} on {len(has.nodes)} nodes: pass fewer --search.cpus-per-trial or --search.workers, or "
            "--search.concurrent 1 for a cluster that grows when asked"
        )
    return Shape(workers, cpu, gpu, search.concurrent or fit)


class _Searcher(Searcher):
    """A searcher that hands out the driver's trials."""

    def __init__(self, driver: Driver, job: SearchJob, folder: str, shape: Shape, own: bool) -> None:
        super().__init__()
        self.driver, self.job, self.folder, self.shape, self.own = driver, job, folder, shape, own
        self.numbers: dict[str, list[int]] = {}
        self.errors: dict[str, str] = {}
        self.open: set[int] = set()
        """Numbers of trials that have begun and not ended."""
        self.exhausted = False

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        planned = self.driver.next()
        if not planned:
            self.exhausted = True
            return Searcher.FINISHED
        self.open |= {each.number for each in planned}
        self.numbers[trial_id] = [each.number for each in planned]
        places = {each.number: self.driver.place(each.number) for each in planned}
        search = to_dict(self.job.search)
        return payload(search, planned, self.folder, places, self.shape.workers, self.shape.cpus, self.own)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record the end of a trial whose process is gone, more often than allowed (`error`); other ends are reported
        by the trial."""
        if error:
            text = self.errors.get(trial_id, "")
            kind: Ending = "out of memory" if any(words in text for words in LOW_ON_MEMORY) else "lost"
            said = " ".join(text.strip().split("\n")[-1].split())[:REASON] or "its process is gone"
            for number in self.numbers[trial_id]:
                self.end(number, Ended(state="failed", kind=kind, reason=said))

    def end(self, number: int, ended: Ended) -> None:
        """Pass a trial's end to the driver."""
        self.open.discard(number)
        self.driver.ended(number, ended, self.shape.gpus * self.shape.workers)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the trials' folders are the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the trials' folders are the state."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the driver: Tune stores its setup, which is never read."""
        return Searcher, ()


class _Scheduler(FIFOScheduler):
    """A scheduler that passes reports on to the driver, and its decisions back."""

    _supports_buffered_results = False

    def __init__(self, searcher: _Searcher) -> None:
        super().__init__()
        self.searcher, self.driver, self.shape = searcher, searcher.driver, searcher.shape

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the driver, like the searcher."""
        return FIFOScheduler, ()

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        # Not trial.get_error(), which reads from storage, where the text arrives later.
        self.searcher.errors[trial.trial_id] = Path(trial.error_file).read_text() if trial.error_file else ""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        for number, value in json.loads(result.get("ended", "{}")).items():
            self.searcher.end(int(number), Ended(**value))
        stopping = False
        for number, value in json.loads(result.get("figures", "{}")).items():
            verdict = self.driver.heard(int(number), value, alone=len(self.searcher.numbers[trial.trial_id]) == 1)
            if verdict is None:
                continue
            stopping = True
            if self.shape.workers > 1:
                ask_to_stop(self.driver.place(int(number)))
            self.searcher.end(int(number), verdict)
        # A trial of several workers ends by itself when it is asked to: killing it would leave its workers running.
        return FIFOScheduler.STOP if stopping and self.shape.workers == 1 else FIFOScheduler.CONTINUE


@contextmanager
def stop_at_sigterm() -> Iterator[list[int]]:
    """Make SIGTERM end Tune in good order, like Ctrl-C, during the with-block; the list is not empty if it was
    received."""
    came: list[int] = []

    def on_signal(number: int, _: object) -> None:
        came.append(number)
        signal.raise_signal(signal.SIGINT)

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def prepare_on_ray(config: Config, folder: str, shape: Shape) -> None:
    """Train, measure and check the parts that trials share, on the cluster. Raises its UserError."""
    task = ray.remote(num_cpus=shape.cpus, num_gpus=shape.gpus, max_retries=0)(prepare_remotely)
    try:
        ray.get(task.remote(to_dict(config), folder, Carried()))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


def _name(trial: Any) -> str:
    """Return the name of a trial in Ray's dashboard and in loggers."""
    return f"trial-{trial.config['planned'][0]['number']:04d}"


def run_on_ray(driver: Driver, job: SearchJob, folder: str, shape: Shape, own: bool, callbacks: list[Any]) -> bool:
    """Run all trials that ``driver`` hands out; return True if a stop was requested before the end (SIGTERM). After
    Ctrl-C, Tune returns as if all were done; this raises KeyboardInterrupt."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its boxes are printed whatever `verbose` says
    # After the end Tune looks for its own logs, and explains how to restore the state that is deleted here.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # trials have their own logs
    scratch = scratch_folder("tune")
    searcher = _Searcher(driver, job, folder, shape, own)
    try:
        tuner = tune.Tuner(
            tune.with_resources(trainable, shape.bundles()),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=_Scheduler(searcher),
                num_samples=-1,
                max_concurrent_trials=shape.concurrent,
                reuse_actors=True,  # a process takes seconds to start: imports, data, teacher
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=scratch,
                failure_config=tune.FailureConfig(max_failures=job.search.retries),
                callbacks=callbacks,
                verbose=0,
            ),
        )
        with stop_at_sigterm() as came:
            tuner.fit()
        if not came and (searcher.open or not searcher.exhausted):
            raise KeyboardInterrupt
        return bool(came)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
