"""Run a config: name its directory, check it, hand it to a launcher, show the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from torch.utils.data import Dataset

from mimkd_ray import storage
from mimkd_ray.cli.local_launch import local_context, run_local, under_torchrun
from mimkd_ray.cli.preflight import preflight
from mimkd_ray.cli.result_table import result_table
from mimkd_ray.config import Config
from mimkd_ray.config.digest import digest
from mimkd_ray.data.sources.own_dataset import OwnData
from mimkd_ray.errors import UserError
from mimkd_ray.on_ray import environment
from mimkd_ray.places import NAME_BYTES, check_name
from mimkd_ray.train.distributed import ask_first
from mimkd_ray.train.records import run_files, start_times
from mimkd_ray.train.records.run_dir import read_json
from mimkd_ray.train.worker import claim

C = TypeVar("C", bound=Config)


def run_directory(config: Config) -> str:
    """URL or absolute path of the run. The default name holds a digest of what is trained: the same command finds
    its run again, another configuration gets another directory."""
    return below_root(config, f"{config.recipe}-{digest(config)[:8]}")


def below_root(config: Config, name: str) -> str:
    """The directory of ``run.name``, or of the default ``name``. Raises UserError for a recipe that makes a bad one."""
    if not config.run.name:
        check_name("recipe", config.recipe)
        check_name("the run's name", name, limit=NAME_BYTES + 20)
    return storage.join(config.run.root, config.run.name or name)


def absolute(config: C) -> C:
    """What users typed for places, made into places (places.py): Ray's workers start in folders of their own."""

    def full(path: str, *names: str) -> str:
        return path if path in names else storage.absolute(path)

    return replace(
        config,
        data=replace(config.data, root=full(config.data.root, "digits"), store=full(config.data.store, "")),
        teacher=replace(config.teacher, weights=full(config.teacher.weights, "random", "published")),
        student=replace(config.student, weights=full(config.student.weights, "random", "published")),
        cache=replace(config.cache, root=full(config.cache.root, "")),
        run=replace(config.run, root=full(config.run.root)),
    )


def run(config: Config, train: Dataset | None = None, validation: Dataset | None = None) -> dict[str, Any]:
    """Run ``config`` to its end, print its table and return its result. A finished run only prints it.

    ``train`` and ``validation`` are map-style data sets of (image, class number), in the place of ``config.data.root``
    (see data/own_dataset.py); without ``validation`` set ``config.data.holdout``. They need ``launch.backend`` local: a
    plain process, or torchrun. Everything else is as with data at rest: lanes, views, resuming.

    Under torchrun every process calls it, and all follow what the first finds in the run directory.
    """
    start_times.begin()
    start_times.mark("parsed")
    given = OwnData.of(train, validation)
    config = absolute(config)
    if given is not None:
        config = _with_given(config, given)
    run_dir = run_directory(config)
    if config.launch.backend == "local":
        with local_context(config.launch) as context:
            return _run(config, run_dir, context.rank == 0, lambda: run_local(config, context, run_dir, given), given)
    if under_torchrun():
        raise UserError(
            "torchrun started this process, and launch.backend is ray, which starts workers by itself: pass "
            "--launch.backend local, or start the job without torchrun"
        )
    return _run(config, run_dir, True, lambda: _run_on_ray(config, run_dir))


def _with_given(config: Config, given: OwnData) -> Config:
    """The config with the name of the data sets that were given, which tells runs on different ones apart."""
    if config.launch.backend != "local":
        raise UserError(
            f"data sets were given as objects of this process, and launch.backend is {config.launch.backend}, whose "
            "workers run in processes of their own: pass LaunchConfig(backend='local'), with torchrun for several "
            "workers, or prepare the images as files (jobs/prepare_data.py)"
        )
    if config.cache.reads:
        raise UserError(
            "data sets were given as objects, and cache.root is set: teacher caches are of images at rest; leave it out"
        )
    return replace(config, data=replace(config.data, root=given.root))


def _run(
    config: Config, run_dir: str, first: bool, work: Callable[[], dict[str, Any]], given: OwnData | None = None
) -> dict[str, Any]:
    """Return the result of a finished run, or check the job and do the ``work``. ``first`` says who prints."""
    finished = ask_first(lambda: _begin(config, run_dir))
    if finished is not None:
        if first:
            print(result_table(finished))
            print(f"this run was finished before; --run.overwrite true does it again\nrun directory: {run_dir}")
        return finished
    preflight(config, given)
    # The first worker does it too, but another config should not cost a start of workers.
    ask_first(lambda: claim(config, run_dir))
    start_times.mark("checked")
    result = work()
    if first:
        print(f"\n{result_table(result)}\nrun directory: {run_dir}", flush=True)
    return result


def _begin(config: Config, run_dir: str) -> dict[str, Any] | None:
    """Delete an old run if ``run.overwrite`` says so, and return the result of a finished one. For one process alone:
    another must not read what this one is about to delete."""
    if config.run.overwrite:
        run_files.overwrite(run_dir)
    finished: dict[str, Any] | None = read_json(storage.join(run_dir, "result.json"))
    if finished is not None:
        claim(config, run_dir)
    return finished


def _run_on_ray(config: Config, run_dir: str) -> dict[str, Any]:
    environment.prepare(config.launch.address)
    from mimkd_ray.on_ray.train_workers import run_ray  # Ray takes seconds to import, and reads its environment then

    return run_ray(config, run_dir)
