"""The trainables of Ray Tune: a trial of one process, a pack, a trial of several workers.

A trial of one process trains in a folder of its own on its node, and reports every evaluation with that folder as its
checkpoint: Ray Tune moves it, keeps it, and gives it to another trial (population-based training).
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from mimkd_ray import console, local_files, storage
from mimkd_ray.config import Config, SearchConfig
from mimkd_ray.config.form.json_form import dotted
from mimkd_ray.errors import Interrupted, UserError
from mimkd_ray.json_files import read_json
from mimkd_ray.search.configs import FieldConfigs, Made, TrialConfigs, trial_config
from mimkd_ray.search.optuna_study import draw_pack
from mimkd_ray.search.run_trials import (
    Tell,
    explain,
    failure,
    failures_told,
    prepare,
    taught,
    train_members,
    train_trial,
)
from mimkd_ray.search.spaces import find_spaces
from mimkd_ray.search.suggest import Grid, Space
from mimkd_ray.search.trial_files import Table, point_of
from mimkd_ray.secret_urls import Carried
from mimkd_ray.train.records.run_dir import read_metrics, write_json

Configs = Callable[[Mapping[str, Any]], Made]
Trainable = Callable[[dict[str, Any]], None]

LISTED = "files.json"
"""File of a checkpoint that lists the others."""

SCHEDULE = "schedule.json"
"""File of a checkpoint with the values that its weights were trained with."""

LOOK_SECONDS = 1.0
"""Seconds between two checks for evaluations of a trial of several workers."""


def trainable(
    config: Config, space: str | Space | Sequence[str | Space] = (), *, holdout: float = 0.1, folder: str = ""
) -> Trainable:
    """Return the trainable that `mimkd_ray.trainable` promises."""
    if config.teacher.trains and not folder:
        raise UserError("the teacher is trained first, and every trial would train it: give trainable(..., folder=...)")
    base = trial_config(config, SearchConfig(holdout=holdout))
    configs = checked(configs_of(base, space))
    secrets = Carried()

    def distil(params: dict[str, Any]) -> None:
        _ = secrets  # whoever unpickles this function knows them
        with trial_folder() as run_dir:
            own = within(configs(params).config)
            train_trial(own, folder or run_dir, run_dir, trial_device(), reporter(run_dir))

    return distil


def configs_of(base: Config, space: str | Space | Sequence[str | Space]) -> TrialConfigs | FieldConfigs:
    """Return the map from hyperparameters to configs: by spaces, or without any by the names of fields."""
    if not space:
        return FieldConfigs(base)
    if isinstance(space, str) or callable(space):
        space = [space]
    named = find_spaces([each for each in space if isinstance(each, str)])
    return TrialConfigs(base, [*named, *(each for each in space if not isinstance(each, str))])


def checked(configs: TrialConfigs | FieldConfigs) -> Configs:
    """Return the map, which refuses a hyperparameter that would change nothing; one by fields does by itself."""
    if isinstance(configs, FieldConfigs):
        return configs
    _ = configs.asked  # found here, once for all trials, whose processes get it with the map

    def made(params: Mapping[str, Any]) -> Made:
        configs.check(dict(dotted(params)))
        return configs(params)

    return made


def search_trainable(
    configs: Configs, folder: str, cpus: float, population: bool = False, raises: bool = False
) -> Trainable:
    """Return the trainable of a search: as :func:`trainable`, but a trial's own failure is a result unless it
    ``raises``. ``population``: values may change on the way."""
    told_by = nullcontext if raises else failures_told
    secrets = Carried()

    def trial(params: dict[str, Any]) -> None:
        _ = secrets
        with trial_folder() as run_dir, told_by(reporter(run_dir)) as tell:
            made = configs(params)
            told = with_schedule(run_dir, made.params, tell) if population else tell
            train_trial(within(made.config, cpus), folder, run_dir, trial_device(), told)

    return trial


def pack_trainable(
    search: SearchConfig, configs: TrialConfigs, grid: Grid | None, folder: str, cpus: float
) -> Trainable:
    """Return the trainable of a pack, whose number is its one hyperparameter: see search/run_trials.py."""
    secrets = Carried()

    def pack(params: dict[str, Any]) -> None:
        _ = secrets
        with trial_folder() as run_dir:
            url = storage.join(run_dir, "members.json")
            drawn = read_json(url, ("members",))
            if drawn is None:
                known = Table(folder, search.metric).trials() if search.algorithm == "tpe" else []
                drawn = {"members": draw_pack(search, configs, params["pack"], known, grid)}
                write_json(url, drawn)
            members = drawn["members"]
            report = reporter(run_dir)
            text = json.dumps(members)
            with failures_told(lambda figures: report({**figures, "drawn": text})) as tell:
                own = [within(configs(member).config, cpus) for member in members]
                train_members(search, own, folder, run_dir, trial_device(), tell)

    return pack


def trial_device() -> torch.device:
    """Return the GPU that Ray assigned to this process, or the CPU."""
    return torch.device("cuda", 0) if ray.get_gpu_ids() else torch.device("cpu")


def within(config: Config, cpus: float = 0) -> Config:
    """Return the config with one loader process for each of the trial's CPUs but one, if their number is automatic: the
    default would take all CPUs of the machine, which other trials share."""
    if config.data.loader_workers != -1:
        return config
    if not cpus:
        bundles = tune.get_context().get_trial_resources().bundles
        cpus = sum(bundle.get("CPU", 0) for bundle in bundles)
    return replace(config, data=replace(config.data, loader_workers=max(0, int(cpus) - 1)))


@contextmanager
def trial_folder() -> Iterator[str]:
    """A with-block with a local folder that holds what the trial's checkpoint holds."""
    console.use(console.Nobody())  # the search tells of its trials
    # A process that is used again waits this long for the end of this function, and fails the next trial after it.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "120")
    with local_files.scratch("trial") as folder:
        found = tune.get_checkpoint()
        if found is not None:
            found.to_directory(folder)
            # Ray writes a checkpoint over one of the same number, which a trial left that was given another one's.
            listed = read_json(storage.join(folder, LISTED), ("files",)) or {"files": []}
            for path in set(_files(folder)) - {LISTED, *listed["files"]}:
                storage.remove_file(storage.join(folder, path))
        yield folder


def _files(folder: str) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()]


def reporter(run_dir: str) -> Tell:
    """Return the callback that reports figures to Ray Tune, with the folder as the checkpoint."""

    def tell(figures: Mapping[str, Any]) -> None:
        # Loggers complain of infinity, the ceiling of bounds that have none.
        told = {name: value for name, value in figures.items() if not (name.endswith("/ceiling") and value == math.inf)}
        files = _files(run_dir)
        if not files:
            tune.report(told)
            return
        write_json(storage.join(run_dir, LISTED), {"files": files})
        tune.report(told, checkpoint=tune.Checkpoint.from_directory(run_dir))

    return tell


def with_schedule(run_dir: str, params: Mapping[str, Any], tell: Tell) -> Tell:
    """Return the callback that also tells the "schedule": pairs of an epoch and the values until then, as JSON. They
    travel with the checkpoint."""
    url = storage.join(run_dir, SCHEDULE)
    lived = (read_json(url, ("schedule",)) or {"schedule": []})["schedule"]
    if not lived or lived[-1][1] != params:
        lived.append([0, dict(params)])

    def telling(figures: Mapping[str, Any]) -> None:
        lived[-1][0] = figures["epoch"]
        write_json(url, {"schedule": lived})
        tell({**figures, "schedule": json.dumps(lived)})

    return telling


def prepare_remotely(config: Config, folder: str, _secrets: Carried) -> None:
    """Call search.run_trials.prepare, as a Ray task."""
    storage.be_patient(config.storage.patience_minutes)
    prepare(config, folder, trial_device())


class LargeTrial(tune.Trainable):
    """A trial of several workers: a run of Ray Train in a directory of its own, which this process starts and watches.

    A class, and not a function that waits in `fit` with Ray's TuneReportCallback: Tune calls `cleanup` to stop a trial,
    which asks the workers to save and end and waits until their resources are free. A function would be killed, and
    leave it to others to end its workers.
    """

    def setup(
        self, config: dict[str, Any], configs: Configs, folder: str, cpus: int, own: bool, secrets: Carried
    ) -> None:
        """Begin or go on. ``cpus``: those of a worker; by itself a run would take all that are there now, also those of
        other trials. ``own``: this Ray was started for the search."""
        from mimkd_ray.on_ray.worker_context import STOP

        self._place = storage.join(folder, "trials", self.trial_id)
        self._seen = 0
        self._error: BaseException | None = None
        storage.remove_file(storage.join(self._place, STOP))  # of one that was killed in `cleanup`
        made = taught(configs(config).config, folder)
        self._config = replace(made, launch=replace(made.launch, cpus_per_worker=cpus))
        self._thread = threading.Thread(target=self._fit, args=(own,), name="fit", daemon=True)
        self._thread.start()

    def _fit(self, own: bool) -> None:
        from mimkd_ray.on_ray.train_workers import fit_workers

        console.use(console.Nobody())
        try:
            fit_workers(self._config, self._place, own)
        except BaseException as error:
            self._error = error

    def step(self) -> dict[str, Any]:
        """Return the next evaluation; after the last one what the run ended with."""
        figures = failure(0)
        while True:
            running = self._thread.is_alive()  # read before the metrics, so that the last ones are not missed
            for line in read_metrics(self._place, "eval"):
                figures = {**line, "cross_entropy": point_of(line).cross_entropy}
                if line["step"] > self._seen:
                    self._seen = line["step"]
                    return figures
            if not running:
                break
            self._thread.join(LOOK_SECONDS)
        if self._error is None or isinstance(self._error, Interrupted):
            return {**figures, "done": True}
        kind, reason = explain(self._error)
        return {**failure(figures["epoch"]), "failed": kind, "reason": reason, "done": True}

    def cleanup(self) -> None:
        """Ask the workers to save and end, and wait for it."""
        from mimkd_ray.on_ray.worker_context import ANYBODY, STOP

        if self._thread.is_alive():
            write_json(storage.join(self._place, STOP), {"launch_id": ANYBODY})
            self._thread.join()
            storage.remove_file(storage.join(self._place, STOP))

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write where the run is: its directory has its checkpoints."""
        write_json(storage.join(checkpoint_dir, "place.json"), {"place": self._place})

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Do nothing: the run goes on from its own newest checkpoint."""
