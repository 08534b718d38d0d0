"""Run a config: name its directory, check it, hand it to a launcher, show the result."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, TypeVar

from mimkd_ray import storage
from mimkd_ray.launch import environment
from mimkd_ray.launch.local import run_local, under_torchrun
from mimkd_ray.launch.table import result_table
from mimkd_ray.train import timeline
from mimkd_ray.train.config import Config, digest
from mimkd_ray.train.files import read_json
from mimkd_ray.train.job import claim
from mimkd_ray.train.preflight import preflight

C = TypeVar("C", bound=Config)


def run_directory(config: Config) -> str:
    """URL or absolute path of the run. The default name holds a digest of what is trained: the same command finds
    its run again, another configuration gets another directory."""
    return storage.join(config.run.root, config.run.name or f"{config.recipe}-{digest(config)[:8]}")


def absolute(config: C) -> C:
    """Local paths made absolute: Ray's workers start in folders of their own."""

    def full(path: str, *names: str) -> str:
        return path if path in names or storage.is_remote(path) else os.path.abspath(path)

    return replace(
        config,
        data=replace(config.data, root=full(config.data.root, "digits"), store=full(config.data.store, "")),
        teacher=replace(config.teacher, weights=full(config.teacher.weights, "random", "published")),
        student=replace(config.student, weights=full(config.student.weights, "random", "published")),
        cache=replace(config.cache, root=full(config.cache.root, "")),
        run=replace(config.run, root=full(config.run.root)),
    )


def run(config: Config) -> dict[str, Any]:
    """Run ``config`` to its end and print its table. A finished run only prints it."""
    timeline.begin()
    timeline.mark("parsed")
    config = absolute(config)
    first = int(os.environ.get("RANK", "0")) == 0 if under_torchrun() else True
    run_dir = run_directory(config)
    if first and config.run.overwrite:
        storage.remove_tree(run_dir)
    finished = read_json(storage.join(run_dir, "result.json"))
    if finished is not None:
        claim(config, run_dir)
        if first:
            print(result_table(finished))
            print(f"this run was finished before; --run.overwrite true does it again\nrun directory: {run_dir}")
        return finished
    preflight(config)
    if first:
        claim(config, run_dir)  # the first worker does it too, but another config should not cost a start of workers
    timeline.mark("checked")
    if config.launch.backend == "local":
        result = run_local(config, run_dir)
    else:
        environment.prepare(config.launch.address)
        from mimkd_ray.launch.ray_train import run_ray  # Ray takes seconds to import, and reads its environment then

        result = run_ray(config, run_dir)
    if first:
        print(f"\n{result_table(result)}\nrun directory: {run_dir}", flush=True)
    return result
