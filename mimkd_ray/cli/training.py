"""Run a config: name its directory, check it, hand it to a launcher, show the result."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from torch.utils.data import Dataset

from mimkd_ray import console, storage
from mimkd_ray.cli.local_launch import local_context, run_local, under_torchrun
from mimkd_ray.cli.preflight import preflight
from mimkd_ray.cli.result_table import result_table
from mimkd_ray.cli.run_summary import closing, opening
from mimkd_ray.config import Config
from mimkd_ray.config.digest import identity
from mimkd_ray.data.sources.own_dataset import OwnData
from mimkd_ray.errors import UserError
from mimkd_ray.models.weights_file import FOLDER, HUB
from mimkd_ray.on_ray.nodes import environment
from mimkd_ray.pages.write_pages import try_to_write_report
from mimkd_ray.places import NAME_BYTES, check_lasting, check_name, is_function
from mimkd_ray.run_lock import check_free, held
from mimkd_ray.train.distributed import ask_first
from mimkd_ray.train.job import needs_teacher
from mimkd_ray.train.records import run_files
from mimkd_ray.train.records.extended_runs import leg_of
from mimkd_ray.train.records.outcomes import claim, find_result
from mimkd_ray.train.start_times import StartTimes
from mimkd_ray.train.trained_teacher import check_leg

C = TypeVar("C", bound=Config)


def run_directory(config: Config) -> str:
    """URL or absolute path of the run. The default name has teacher, student, data and a digest of what is trained: the
    same command finds its run again, another configuration gets another directory."""
    parts = [*([config.teacher.name] if needs_teacher(config) else []), config.student.name, config.data.root]
    names = [re.sub(r"[^\w.]+", "_", re.split(r"[/:]", part.rstrip("/"))[-1])[:40] for part in parts]
    return below_root(config, "-".join([*names, identity(config)[:8]]))


def below_root(config: Config, name: str) -> str:
    """The directory of ``run.name``, or of the default ``name``. Raises UserError for a recipe that makes a bad one."""
    check_lasting("--run.root", config.run.root)
    if not config.run.name:
        check_name("recipe", config.recipe)
        check_name("the run's name", name, limit=NAME_BYTES + 20)
    return storage.join(config.run.root, config.run.name or name)


def absolute(config: C) -> C:
    """Return the config with its places as any process needs them (places.py); Ray's workers start elsewhere."""

    def full(path: str, *names: str) -> str:
        return path if path in names or is_function(path) else storage.absolute(path)

    def network(text: str) -> str:
        """A weights file, or the name of a network: a folder that holds one is a path too."""
        scheme, _, folder = text.partition(FOLDER)
        return f"{scheme}{FOLDER}{storage.absolute(folder)}" if folder and scheme in ("", "timm/") else text

    def weights(text: str) -> str:
        return network(text) if text.startswith((HUB, FOLDER)) else full(text, "random", "published")

    cache = full(config.cache.root, "")
    check_lasting("--cache.root", cache)
    return replace(
        config,
        data=replace(config.data, root=full(config.data.root, "digits"), store=full(config.data.store, "")),
        teacher=replace(
            config.teacher,
            name=network(config.teacher.name),
            weights=weights(config.teacher.weights),
            classes=full(config.teacher.classes) if isinstance(config.teacher.classes, str) else config.teacher.classes,
        ),
        student=replace(config.student, name=network(config.student.name), weights=weights(config.student.weights)),
        cache=replace(config.cache, root=cache),
        run=replace(config.run, root=full(config.run.root), start_from=full(config.run.start_from, "")),
    )


def run(config: Config, train: Dataset | None = None, validation: Dataset | None = None) -> dict[str, Any]:
    """Run ``config`` to its end, print its table and return its result, as result.json has it: "student" and "teacher"
    with their top-1, "nats" of each term; of a comparison "compare", by arm. A finished run only prints it.

    ``train`` and ``validation`` are map-style data sets of (image, class number), in the place of ``config.data.root``
    (see data/sources/own_dataset.py); without ``validation`` set ``config.data.holdout``. They need ``launch.backend``
    local: a plain process, or torchrun. Everything else is as with data at rest: lanes, views, resuming.

    Under torchrun every process calls it, and all follow what the first finds in the run directory. Raises UserError
    for what cannot be run, and Interrupted once it has saved after SIGTERM or Ctrl-C: called again, it goes on.
    """
    times = StartTimes()
    times.mark("parsed")
    console.told.clear()
    storage.be_patient(config.storage.patience_minutes)
    given = OwnData.of(train, validation)
    config = absolute(config)
    if given is not None:
        config = _with_given(config, given)
    run_dir = run_directory(config)
    if config.run.extend:
        config, run_dir = leg_of(config, run_dir)
        check_leg(config, run_dir)
    if config.launch.backend == "local":
        with local_context(config.launch, times) as context:
            # Of torchrun: as many as it has started.
            config = replace(config, launch=replace(config.launch, workers=context.world_size))
            work = partial(run_local, config, context, run_dir, given)
            return _run(config, run_dir, context.rank == 0, work, times, given)
    if under_torchrun():
        raise UserError(
            "torchrun started this process, and launch.backend is ray, which starts workers by itself: pass "
            "--launch.backend local, or start the job without torchrun"
        )
    return _run(config, run_dir, True, partial(_run_on_ray, config, run_dir, times), times)


def _with_given(config: Config, given: OwnData) -> Config:
    """The config with the name of the data sets that were given, which tells runs on different ones apart."""
    if config.launch.backend != "local":
        raise UserError(
            f"data sets were given as objects of this process, and launch.backend is {config.launch.backend}, whose "
            "workers run in processes of their own: pass LaunchConfig(backend='local'), with torchrun for several "
            "workers, or --data.root package.module:function, which every worker calls"
        )
    if config.cache.reads:
        raise UserError(
            "data sets were given as objects, and cache.root is set: teacher caches are of images at rest; leave it out"
        )
    return replace(config, data=replace(config.data, root=given.root))


def _run(
    config: Config,
    run_dir: str,
    first: bool,
    work: Callable[[], dict[str, Any]],
    times: StartTimes,
    given: OwnData | None = None,
) -> dict[str, Any]:
    """Return the result of a finished run, or check the job and do the ``work``. ``first`` says who prints."""
    with console.phase(f"looking at {run_dir}", said=False):  # a store that is away may take half a minute
        finished = ask_first(lambda: _finished(config, run_dir))
    if finished is not None:
        if first:
            console.line(result_table(finished))
            console.line("this run was finished before; --run.overwrite true does it again")
            console.line(closing(config, run_dir))
        return finished
    if first:
        console.line(opening(config, run_dir))
    with console.phase("checking data, networks and places"):
        preflight(config, given)
    if config.run.overwrite:  # not before: a config that cannot be run costs nothing that is there
        ask_first(lambda: _overwrite(run_dir))
    with ExitStack() as lock:  # not before either: a config that cannot be run leaves no file behind
        ask_first(lambda: lock.enter_context(held(run_dir)))
        ask_first(lambda: claim(config, run_dir))
        times.mark("checked")
        result = work()
    if first:
        with console.phase("writing report.html", said=False):
            report = try_to_write_report(run_dir)
        console.line(f"\n{result_table(result)}\n{closing(config, run_dir, report)}")
    return result


def _finished(config: Config, run_dir: str) -> dict[str, Any] | None:
    """Return the result of a finished run, unless ``run.overwrite`` says that it is done again. For one process alone.
    Raises UserError for a directory that is in use, or was begun with another config."""
    check_free(run_dir)
    if config.run.overwrite:
        return None
    finished = find_result(config, run_dir)
    if finished is not None:
        with suppress(UserError):  # the result can be read where nothing can be written
            claim(config, run_dir)  # an earlier release may have saved a URL with its password
    return finished


def _overwrite(run_dir: str) -> None:
    """Delete an old run, unless another process has begun it meanwhile. For one process alone."""
    check_free(run_dir)
    run_files.overwrite(run_dir)


def _run_on_ray(config: Config, run_dir: str, times: StartTimes) -> dict[str, Any]:
    environment.prepare(config.launch.address)
    with console.phase("loading Ray", said=False):
        from mimkd_ray.on_ray.train_workers import run_ray  # Ray reads its environment when it is imported

    return run_ray(config, run_dir, times)
