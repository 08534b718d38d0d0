"""Building of a cache on all nodes: a pool of actors, each with a teacher on its GPU or its share of the CPUs.

Ray Data hands units to actors, changes their number within `cache.workers`, and repeats a unit if its process or node
dies. Only a description of the unit and a line about its result pass through Ray: images are decoded by the actor's own
loader processes, and features go from the actor to the storage.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import ray.data
import torch

from mimkd_ray import storage
from mimkd_ray.cache_build.build_setup import Seen, Setup, Unit
from mimkd_ray.cache_build.build_units import Builder
from mimkd_ray.cache_build.measured_plan import measured_plan
from mimkd_ray.config import Config
from mimkd_ray.config.form.json_form import from_dict, to_dict
from mimkd_ray.data.prepare.work_units import Done
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.errors import UserError
from mimkd_ray.on_ray.driver_console import heard
from mimkd_ray.on_ray.nodes.node_capacity import Capacity
from mimkd_ray.on_ray.nodes.placement import wait_for_nodes, wait_for_room
from mimkd_ray.on_ray.remote_errors import ERRORS, fetch, raise_told, with_patience
from mimkd_ray.on_ray.run_work_units import answer, quiet_and_patient
from mimkd_ray.secret_urls import Carried
from mimkd_ray.train.networks.device_settings import teacher_autocast

UNITS_PER_CALL = 4
"""Units that an actor gets at a time: while one is computed, the next is decoded and the last are written."""

CPUS_PER_BUILDER = 2

TELL_SECONDS = 1.0
"""Between two messages of an actor about how far it is."""


class Cluster:
    """The resources of the connected Ray for building."""

    fewest: int
    most: int

    def __init__(self, config: Config, own: bool) -> None:
        """Choose the builders. ``own``: this process started Ray. Raises UserError if they do not fit the cluster, or
        find no room beside other jobs in time, or for an invalid config."""
        launch, (fewest, most) = config.launch, config.cache.worker_range  # both 0: as many as fit
        wait_for_nodes(partial(self._fit, config), launch, own, fewest, launch.cpus_per_worker)
        if not own:
            wait = 60 * launch.wait_minutes
            needs = (self.cpus, int(self.gpu))
            fewer = "--cache.workers or --launch.cpus-per-worker"
            free = wait_for_room(
                self.fewest, *needs, wait, "builder", fewer, lambda free: not most and free.room(*needs) > 0
            )
            if free is not None and not most:
                self.fewest = self.most = min(self.most, free.room(*needs))
        in_memory = open_data(config.data).train.in_memory
        if config.data.loader_workers == -1 and not in_memory:
            config = replace(config, data=replace(config.data, loader_workers=self.cpus))
        if config.cache.precision == "auto" and self.gpu:
            task = ray.remote(num_cpus=0, num_gpus=1)(_precision)
            name = fetch(task.remote(to_dict(config), Carried()))
            config = replace(config, cache=replace(config.cache, precision=name))
        self.config = config

    def _fit(self, config: Config, has: Capacity) -> None:
        """Choose the builders. Raises UserError if there are too few nodes."""
        launch = config.launch
        self.gpu = has.uses_gpu(launch.gpu)
        fewest, most = config.cache.worker_range
        automatic = has.cpus_per_gpu() if self.gpu else min(CPUS_PER_BUILDER, has.most_cpus(1))
        self.cpus = launch.cpus_per_worker or automatic
        there = has.room(self.cpus, int(self.gpu))
        self.fewest, self.most = (fewest, most) if most else (max(1, there), max(1, there))
        if lack := has.lack(self.fewest, "builder", self.cpus, int(self.gpu)):
            raise UserError(
                f"{lack}; pass --cache.workers {max(1, there)}, or fewer --launch.cpus-per-worker, or add nodes "
                "(--launch.wait-minutes waits for an autoscaler)"
            )

    def setup(self) -> Setup:
        """Return the setup for the driver, which needs no GPU."""
        return Setup(self.config, torch.device("cpu"))

    def plan(self) -> str:
        """Return the plan, measured on a builder's device. Raises UserError for a config for which nothing can be
        cached."""
        task = ray.remote(num_cpus=self.cpus, num_gpus=int(self.gpu), max_retries=0)(_plan)
        return str(fetch(task.remote(to_dict(self.config), self.cpus, Carried())))

    def run(self, units: Sequence[Unit], seen: Seen) -> Iterator[tuple[int, Done]]:
        """Run the units; a `Runner`. Raises a unit's UserError, DamagedDataError or StorageError."""
        with heard(lambda far: seen(*far)) as mailbox:
            yield from self._run(units, mailbox)

    def _run(self, units: Sequence[Unit], mailbox: Any) -> Iterator[tuple[int, Done]]:
        quiet_and_patient()
        rows = [{"number": number, "unit": ray.cloudpickle.dumps(unit)} for number, unit in enumerate(units)]
        calls = -(-len(rows) // UNITS_PER_CALL)
        workers = min(self.most, calls)
        done = ray.data.from_items(rows, override_num_blocks=calls).map_batches(
            BuildActor,
            batch_size=None,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(min_size=min(self.fewest, workers), max_size=workers),
            fn_constructor_args=(to_dict(self.config), self.cpus, mailbox, Carried()),
            num_cpus=self.cpus,
            num_gpus=int(self.gpu),
        )
        for row in done.iter_rows():
            if row["error"]:
                raise_told(row["error"], row["message"])
            yield int(row["number"]), Done(int(row["rows"]), int(row["bytes"]))


class BuildActor:
    """An actor that builds."""

    def __init__(self, config: dict[str, Any], cpus: int, mailbox: Any, _secrets: Carried) -> None:
        self.mailbox, self.told = mailbox, 0.0
        self.builder: Builder | None = None
        self.failed: Exception | None = None
        try:
            self.builder = Builder(_setup(config, cpus))
        except ERRORS as error:
            self.failed = error  # an actor whose constructor raises would be restarted for ever

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        """Run the units of a batch and yield the result of each. After a failure of storage it waits and tries
        again."""
        left = {
            int(number): ray.cloudpickle.loads(unit)
            for number, unit in zip(batch["number"], batch["unit"], strict=True)
        }
        if self.builder is None:
            yield _row(-1, self.failed)
            return
        builder = self.builder

        def build() -> Iterator[tuple[int, Done]]:
            numbers = list(left)

            def seen(place: int, rows: int) -> None:
                if time.monotonic() - self.told >= TELL_SECONDS:
                    self.told = time.monotonic()
                    self.mailbox.put.remote((numbers[place], rows))

            for place, done in builder.run(list(left.values()), seen):
                del left[numbers[place]]
                yield numbers[place], done

        try:
            for number, done in with_patience(build):
                yield _row(number, None, done)
        except ERRORS as error:
            yield _row(-1, error)


def _row(number: int, error: Exception | None, done: Done = Done(0, 0)) -> dict[str, list[Any]]:  # noqa: B008
    return {"number": [number], **{name: [value] for name, value in answer(error, done).items()}}


def _setup(config: dict[str, Any], cpus: int) -> Setup:
    torch.set_num_threads(cpus)  # the same in every builder, because sums may depend on it
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    made = from_dict(Config, config)
    storage.be_patient(made.storage.patience_minutes)
    return Setup(made, torch.device("cuda" if ray.get_gpu_ids() else "cpu"))


def _plan(config: dict[str, Any], cpus: int, _secrets: Carried) -> str:
    return measured_plan(_setup(config, cpus)).text()


def _precision(config: dict[str, Any], _secrets: Carried) -> str:
    """Return the precision that `auto` selects on a builder's GPU."""
    autocast = teacher_autocast(from_dict(Config, config), torch.device("cuda"))
    return "float32" if autocast is None else "bf16"
