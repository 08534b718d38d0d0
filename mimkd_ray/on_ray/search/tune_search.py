"""A search by Ray Tune: its Tuner, which the same command restores, and the finalists as a second experiment."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pyarrow.fs
import ray
from ray import tune
from ray.tune import ResultGrid
from ray.tune.schedulers import PopulationBasedTraining

from mimkd_ray import console, remote_filesystem, storage
from mimkd_ray.config import Config, SearchConfig, SearchJob
from mimkd_ray.config.jobs.search import POPULATION, search_job
from mimkd_ray.errors import Interrupted, UserError, count
from mimkd_ray.on_ray.nodes.cluster import connect
from mimkd_ray.on_ray.nodes.node_capacity import Capacity
from mimkd_ray.on_ray.nodes.placement import OWN_MINUTES, LossWatch, wait_for_nodes, wait_for_room
from mimkd_ray.on_ray.remote_errors import fetch
from mimkd_ray.on_ray.search.search_journal import FinalsCounter, Journal
from mimkd_ray.on_ray.search.tune_algorithms import (
    check_fields,
    loggers,
    metric_of,
    optuna_for,
    scheduler_of,
    searcher_of,
    tune_space,
    with_metric,
)
from mimkd_ray.on_ray.search.tune_trials import (
    Configs,
    LargeTrial,
    checked,
    configs_of,
    pack_trainable,
    prepare_remotely,
    search_trainable,
)
from mimkd_ray.search.configs import FieldConfigs, TrialConfigs, trial_config
from mimkd_ray.search.finals import Finals
from mimkd_ray.search.suggest import Grid, Space
from mimkd_ray.secret_urls import Carried
from mimkd_ray.signals import handled

HEAD_SHARE = 0.001
"""Share of the head node's own resource for the process that watches a trial of several workers. There it takes no CPU
from the workers that it waits for, and outlives nodes that come and go."""


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

    def needs(self) -> dict[str, float]:
        """Return the resources of a trial."""
        own = {"CPU": self.workers * self.cpus, "GPU": self.workers * self.gpus}
        return {name: amount for name, amount in own.items() if amount}

    def text(self) -> str:
        """Return the resources in words."""
        each = count(self.cpus, "CPU") + (f" and {count(self.gpus, 'GPU')}" if self.gpus else "")
        whole = f"{self.workers} workers with {each} each" if self.workers > 1 else each
        return f"{self.concurrent} at a time, {whole} a trial"


def shape_of(job: SearchJob, has: Capacity, own: bool = False) -> Shape:
    """Return the resources of a trial and the number of trials at the same time, for a cluster of this capacity. Raises
    UserError if not even one fits: Tune would wait for ever. ``own``: this is a Ray that was started here, which does
    not grow."""
    search, launch = job.search, job.launch
    workers = search.workers
    use_gpu = has.uses_gpu(launch.gpu)
    gpu = (search.gpus_per_trial or 1.0) if use_gpu else 0.0
    if workers > 1:
        gpu = 1.0 if use_gpu else 0.0
        cpu: float = launch.cpus_per_worker or (has.cpus_per_gpu() if use_gpu else 1)
    else:
        cpu = search.cpus_per_trial or (max(1, math.floor(has.cpus_per_gpu() * gpu)) if use_gpu else 1)
    lack = has.lack(workers, "trial worker" if workers > 1 else "trial", cpu, gpu)
    if lack and (own or not search.concurrent):
        growing = "for a cluster that grows when asked --launch.wait-minutes, or --search.concurrent 1"
        raise UserError(
            f"{lack}: pass fewer --search.cpus-per-trial or --search.workers" + ("" if own else f"; {growing}")
        )
    wanted = 0 if search.scheduler in POPULATION else search.concurrent
    return Shape(workers, cpu, gpu, wanted or max(has.room(cpu, gpu) // workers, 1))


def shape_there(job: SearchJob, own: bool) -> Shape:
    """Return the shape of trials in the connected Ray (``own``: started here), once one fits: see `wait_for_nodes`."""
    search = job.search
    cpus = job.launch.cpus_per_worker if search.workers > 1 else search.cpus_per_trial
    return wait_for_nodes(partial(shape_of, job, own=own), job.launch, own, search.workers, cpus)


def wait_for_others(job: SearchJob, shape: Shape) -> None:
    """Wait until a trial finds room beside what other jobs hold of a cluster that is joined: Tune would wait for ever,
    and without a word. Raises UserError after `launch.wait_minutes`."""
    if Capacity.of_cluster().room(shape.cpus, shape.gpus) >= shape.workers:  # else the cluster grows when asked
        what = "trial worker" if shape.workers > 1 else "trial"
        fewer = "--search.workers or --search.cpus-per-trial"
        wait_for_room(shape.workers, shape.cpus, shape.gpus, 60 * job.launch.wait_minutes, what, fewer)


def search(
    config: Config,
    space: str | Space | Sequence[str | Space] | dict[str, Any],
    *,
    tune_config: tune.TuneConfig | None,
    run_config: tune.RunConfig | None,
    resources: dict[str, float] | None,
    holdout: float,
) -> ResultGrid:
    """Search as `mimkd_ray.search` promises."""
    own = SearchConfig(holdout=holdout, finalists=0)
    job = search_job(config, search=own)
    name = f"search-{config.recipe}"
    root = storage.absolute(config.run.root)
    run_config = run_config or tune.RunConfig(name=name, storage_path=root)
    run_config = replace(run_config, callbacks=[*(run_config.callbacks or []), *loggers(config.run.loggers, name)])
    # All that may be wrong is found before Ray starts: in its trials, each would fail with the same reason.
    if not space:
        raise UserError("the space is empty: name what to search, such as ['temperature', 'weights']")
    base = trial_config(job, own)
    param_space = space if isinstance(space, dict) else None
    configs = configs_of(base, () if isinstance(space, dict) else space)
    shared = configs.widest() if isinstance(configs, TrialConfigs) else base
    if isinstance(configs, FieldConfigs) and param_space:
        check_fields(configs, param_space)
    if tune_config:
        tune_config = with_metric(tune_config)
    else:
        asha = scheduler_of(own, configs)
        tune_config = tune.TuneConfig(num_samples=own.trials, scheduler=asha, reuse_actors=True, **metric_of(own))
    if isinstance(configs, TrialConfigs):
        if tune_config.search_alg is None and not isinstance(tune_config.scheduler, PopulationBasedTraining):
            tune_config = replace(tune_config, search_alg=optuna_for(configs, tune_config))
        else:
            param_space = tune_space(configs)
    if not ray.is_initialized():
        with console.phase("starting Ray"):
            connect(config.launch.address, "launch.address")
    shape = shape_of(job, Capacity.of_cluster()) if resources is None else _shape_given(resources)
    place = root if run_config.storage_filesystem else storage.absolute(str(run_config.storage_path or "~/ray_results"))
    folder = storage.join(place, run_config.name or name)
    with console.phase("preparing what all trials share"):
        prepare_on_ray(shared, folder, shape)
    fails = run_config.failure_config is not None and run_config.failure_config.fail_fast
    trial = search_trainable(checked(configs), folder, shape.cpus, raises=bool(fails))
    trial.__name__ = "distil"  # as that of mimkd_ray.trainable: Tuner.restore takes it
    trial = tune.with_resources(trial, shape.bundles())
    return tune.Tuner(trial, param_space=param_space, tune_config=tune_config, run_config=run_config).fit()


def _shape_given(resources: dict[str, float]) -> Shape:
    """Return the shape of trials with these resources. Raises UserError for what does not fit: Tune would wait."""
    shape = Shape(1, resources.get("CPU", 0), resources.get("GPU", 0), 1)
    if {*resources} - {"CPU", "GPU"} or not shape.needs():
        raise UserError(f"resources is {resources}: give CPU and GPU; mimkd_ray.trainable takes tune.with_resources")
    if lack := Capacity.of_cluster().lack(1, "trial", shape.cpus or HEAD_SHARE, shape.gpus):
        raise UserError(f"{lack}: give smaller resources")
    return shape


def prepare_on_ray(config: Config, folder: str, shape: Shape) -> None:
    """Train, measure and check the parts that trials share, on the cluster. Raises its errors for the user."""
    task = ray.remote(num_cpus=shape.cpus, num_gpus=shape.gpus, max_retries=0)(prepare_remotely)
    fetch(task.remote(config, folder, Carried()))


@contextmanager
def while_nodes_last(job: SearchJob, shape: Shape, own: bool) -> Iterator[None]:
    """A with-block that raises Interrupted once the nodes have had no room for a trial for too long, OWN_MINUTES in a
    Ray that was started for the search, else `launch.lost_minutes`: Tune would wait for ever. (A driver whose head is
    gone is ended by Ray after a minute.)"""
    minutes = OWN_MINUTES if own else job.launch.lost_minutes
    watch = LossWatch(shape.needs(), "a trial needs", minutes)
    try:
        with watch:
            yield
    except (KeyboardInterrupt, SystemExit):
        if watch.gave_up:
            raise Interrupted(watch.gave_up) from None
        raise


def run_trials(job: SearchJob, folder: str, configs: TrialConfigs, grid: Grid | None, shape: Shape, own: bool) -> None:
    """Run the trials of a search to their ends, or go on with them. ``grid``: the combinations of one. ``own``: this
    Ray was started here."""
    search = job.search
    if search.pack > 1:
        trial = pack_trainable(search, configs, grid, folder, shape.cpus)
    else:
        trial = lone_trial(configs, folder, shape, own, search.scheduler in POPULATION)
    searcher, space, samples = searcher_of(search, configs, grid)
    trials = len(grid) if grid else search.trials  # 0: as many as the budget allows
    journal = Journal(job, folder, configs, shape.gpus * shape.workers, trials)
    kept = 4 if search.scheduler in POPULATION else 2  # others may still copy an older one
    experiment(
        folder,
        "tune",
        tune.with_resources(trial, shape.bundles()),
        space,
        tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler_of(search, configs),
            num_samples=samples,
            # Members of a population wait for each other: one that must not begin would hold up all.
            max_concurrent_trials=None if search.scheduler in POPULATION else shape.concurrent,
            trial_dirname_creator=trial_name,
            reuse_actors=search.workers == 1,  # a process takes seconds to start: imports, data, teacher
            **metric_of(search),
        ),
        tune.RunConfig(
            failure_config=tune.FailureConfig(max_failures=search.retries),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=kept),
            callbacks=[journal, *loggers(job.run.loggers, f"mimkd-{job.recipe}")],
            stop=journal,
            verbose=0,
        ),
    )
    journal.open()  # Tune may have told a copy
    journal.publish()


def lone_trial(configs: Configs, folder: str, shape: Shape, own: bool, population: bool = False) -> Any:
    """Return the trainable of trials that are no packs, of one process or of several workers."""
    if shape.workers == 1:
        return search_trainable(configs, folder, shape.cpus, population)
    parts = {"configs": configs, "folder": folder, "cpus": int(shape.cpus), "own": own, "secrets": Carried()}
    return tune.with_parameters(LargeTrial, **parts)


def run_finals(finals: Finals, folder: str, shape: Shape, own: bool) -> dict[int, dict[str, Any]]:
    """Train the finalists again, each with every seed, to their ends, with the resources of trials; return the last
    figures of each run that was not lost."""
    trial, what = lone_trial(finals, folder, shape, own), "training the finalists"
    how = tune.TuneConfig(
        max_concurrent_trials=shape.concurrent,  # what watches several workers reserves none of their resources
        trial_dirname_creator=trial_name,
        reuse_actors=shape.workers == 1,
    )
    run = tune.RunConfig(
        failure_config=tune.FailureConfig(max_failures=finals.retries),
        checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
        callbacks=[FinalsCounter(what, len(finals.runs))],
        verbose=0,
    )
    space = {"run": tune.grid_search(list(range(len(finals.runs))))}
    with console.phase(what, said=False):
        found = experiment(folder, finals.name, tune.with_resources(trial, shape.bundles()), space, how, run)
    return {each.config["run"]: each.metrics for each in found if not each.error}


def experiment(folder: str, name: str, trial: Any, space: Any, how: tune.TuneConfig, run: tune.RunConfig) -> ResultGrid:
    """Run an experiment of Ray Tune in a folder, or go on with the one that is there. Raises Interrupted after SIGTERM
    and KeyboardInterrupt after Ctrl-C, once Tune has saved its state."""
    for noisy in ("analysis.experiment_analysis", "tune", "utils.resource_updater"):
        logging.getLogger(f"ray.tune.{noisy}").setLevel(logging.CRITICAL)  # how to restore, in other words than ours
    path, fs = tune_place(folder)
    if has_trials(storage.join(folder, name)):
        try:
            tuner = tune.Tuner.restore(f"{path}/{name}", trainable=trial, storage_filesystem=fs)
        except (AttributeError, ImportError, TypeError) as error:
            raise _unreadable(folder, error) from error
    else:
        storage.remove_tree(storage.join(folder, name))  # a kill came before anything was saved
        run = replace(run, name=name, storage_path=path, storage_filesystem=fs)
        tuner = tune.Tuner(trial, param_space=space, tune_config=how, run_config=run)
    came: list[int] = []

    def on_signal(number: int, _: object) -> None:
        came.append(number)
        if came.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt
        console.line("stopping: Ray Tune saves where the trials are; a second Ctrl-C ends at once")
        signal.raise_signal(signal.SIGUSR1)  # at which Tune ends in good order

    def on_usr1(*_: object) -> None:
        raise KeyboardInterrupt  # before Tune has its own handler

    # Tune takes Ctrl-C for itself, and returns as if all were done.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    with handled({signal.SIGINT: on_signal, signal.SIGTERM: on_signal, signal.SIGUSR1: on_usr1}):
        found = tuner.fit()
    if signal.SIGTERM in came:
        raise Interrupted(f"asked to stop: {folder} has what has ended")
    if came:
        raise KeyboardInterrupt
    return found


def _unreadable(folder: str, error: AttributeError | ImportError | TypeError) -> UserError:
    """Return the error about a state of Ray Tune that cannot be unpickled: what is missing is this package's, of
    another version, or it is a module of the user's, which is found from the folder in which the search was begun."""
    named = re.search(r"module '([\w.]+)'", str(error))
    module = error.name if isinstance(error, ImportError) else named and named[1]
    if (module or "").partition(".")[0] == "mimkd_ray" or not (module or isinstance(error, ImportError)):
        return UserError(
            f"{folder} was begun by another version, whose state of Ray Tune cannot be read here ({error}): go on "
            "with that version, or begin anew with --run.overwrite true"
        )
    return UserError(
        f"the state of Ray Tune in {folder} needs {f'module {module}' if module else 'a module'} as it was at the "
        f"beginning ({error}): start in the folder in which it was begun, with the same modules and packages"
    )


def trial_name(trial: Any) -> str:
    """Return the name of a trial's folder: without its values, which make it long."""
    return f"trial-{trial.trial_id}"


def tune_place(folder: str) -> tuple[str, Any]:
    """Return a folder as Ray Tune takes it: its path, and its file system if it is not of this machine."""
    if not storage.is_remote(folder):
        return str(storage.local_path(folder)), None
    fs = remote_filesystem.filesystem(folder)
    return folder.partition("://")[2], pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))


def has_trials(place: str) -> bool:
    """Return whether an experiment of Ray Tune has saved any trial there."""
    states = sorted(url for url in storage.list_files(place, ".json") if "/experiment_state-" in url)
    return bool(states) and bool(json.loads(storage.read_bytes(states[-1]))["trial_data"])
