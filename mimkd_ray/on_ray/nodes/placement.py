"""Number and resources of the workers; waiting for nodes if the cluster has too few, and for those that others hold."""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import ray
from ray.train import ScalingConfig
from ray.util.placement_group import placement_group, remove_placement_group

from mimkd_ray import console
from mimkd_ray.config import Config, LaunchConfig
from mimkd_ray.errors import UserError, count
from mimkd_ray.on_ray.nodes import resource_holders
from mimkd_ray.on_ray.nodes.node_capacity import Capacity

T = TypeVar("T")

LOOK_SECONDS = 5.0
TELL_SECONDS = 60.0
SETTLE_SECONDS = 20.0
"""For which busy nodes are waited for in any case: Ray takes a while to clear up after a job that was killed."""

OWN_MINUTES = 0.5
"""Minutes after which a job gives up the only node of a Ray that it started itself: nobody brings it back."""


def scaling(config: Config, own: bool) -> ScalingConfig:
    """Return the workers and their reservations, from the cluster's resources. Too few raise a UserError: Ray would
    wait for ever.

    A range of workers is elastic in a cluster that others may change; in a Ray started by this process it is the most
    that fit.
    """
    launch, began = config.launch, time.monotonic()
    made = wait_for_nodes(
        lambda has: _fit(config, own, has), launch, own, launch.worker_range[0], launch.cpus_per_worker
    )
    seconds = 60 * launch.wait_minutes - (time.monotonic() - began)
    return made if own else _among_others(config, made, seconds)


def wait_for_nodes(fit: Callable[[Capacity], T], launch: LaunchConfig, own: bool, workers: int, cpus: float = 0) -> T:
    """Return what ``fit`` makes of the cluster's capacity. Its UserError is raised after `launch.wait_minutes`, during
    which an autoscaler is shown the demand for so many workers, with these CPUs each; at once in a Ray of our own."""
    deadline = time.monotonic() + 60 * launch.wait_minutes
    asked = False
    with ExitStack() as demand:
        while True:
            try:
                return fit(Capacity.of_cluster())
            except UserError as error:
                left = deadline - time.monotonic()
                if own or left <= 0:
                    raise
                console.line(f"waiting up to {left / 60:.0f} more minutes for nodes: {error}")
                if not asked:
                    bundle = {"CPU": cpus or 1, **({"GPU": 1} if launch.gpu == "on" else {})}
                    demand.enter_context(_asked_for_nodes([bundle] * max(1, workers)))
                    asked = True
                time.sleep(LOOK_SECONDS)


def _among_others(config: Config, made: ScalingConfig, seconds: float) -> ScalingConfig:
    """Return ``made`` once its fewest workers find room beside what other jobs hold, or what the config allows beside
    them. Raises UserError if there is no room in time."""
    needed = made.num_workers[0] if isinstance(made.num_workers, tuple) else made.num_workers
    each = made.resources_per_worker or {}
    config = replace(config, launch=replace(config.launch, gpu="on" if made.use_gpu else "off"))

    def smaller(free: Capacity) -> ScalingConfig | None:
        try:
            return _fit(config, False, free)
        except UserError:
            return None

    cpus, gpus = each["CPU"], each.get("GPU", 0)
    fewer = "--launch.workers or --launch.cpus-per-worker"
    free = wait_for_room(needed, cpus, gpus, seconds, "worker", fewer, lambda free: smaller(free) is not None)
    found = made if free is None or free.room(cpus, gpus) >= needed else smaller(free)
    assert found is not None
    if found is not made:
        of_each = (found.resources_per_worker or {})["CPU"]
        console.line(f"beside what other jobs hold: {found.num_workers} workers, {of_each:g} CPUs each")
    return found


def wait_for_room(
    workers: int,
    cpus: float,
    gpus: float,
    seconds: float,
    what: str,
    fewer: str = "",
    will_do: Callable[[Capacity], bool] = lambda _: False,
    patience: str = "--launch.wait-minutes",
) -> Capacity | None:
    """Return the capacity beside other jobs once so many ``workers`` fit in it, or after SETTLE_SECONDS once it
    ``will_do``. None where nobody knows what others hold. Raises UserError after ``seconds`` (SETTLE_SECONDS at
    least).

    ``what`` names a worker in messages, ``fewer`` the flags by which less is asked for, ``patience`` that of the
    seconds.
    """
    began, told = time.monotonic(), -TELL_SECONDS
    while True:
        held = resource_holders.held_by_others()
        if held is None:
            return None
        free, passed = Capacity.of_cluster(held), time.monotonic() - began
        room = free.room(cpus, gpus)
        if room >= workers or (passed >= SETTLE_SECONDS and will_do(free)):
            return free
        kind = "GPU" if gpus else "CPU"
        there = Capacity.of_cluster()
        total = there.gpus if gpus else there.cpus
        taken = sum(each.amounts.get(kind, 0.0) for each in held)
        gpu = f" and {gpus:g} GPU" if gpus else ""
        text = (
            f"there is no room for {count(workers, what)} with {count(cpus, 'CPU')}{gpu} each: other jobs hold "
            f"{taken:g} of the cluster's {total} {kind}s ({resource_holders.named(held, kind)})"
        )
        left = max(SETTLE_SECONDS, seconds) - passed
        if left <= 0:
            raise UserError(
                f"{text}: wait for them with {patience} 60, or stop them"
                + (f", or pass fewer {fewer} (there is room for {room} now)" if fewer else "")
            )
        if passed - told >= TELL_SECONDS:
            told = passed
            console.line(f"waiting up to {left / 60:.1f} more minutes ({patience}): {text}")
        time.sleep(LOOK_SECONDS)


def _fit(config: Config, own: bool, has: Capacity) -> ScalingConfig:
    launch, cpus, gpus = config.launch, has.cpus, has.gpus
    use_gpu = has.uses_gpu(launch.gpu)
    there = gpus if use_gpu else cpus
    fewest, most = launch.worker_range
    if most == 0:
        fewest = most = max(1, min(config.train.lanes, there))
    elastic = fewest < most and not own
    workers = fewest if elastic else max(fewest, min(most, there))
    if use_gpu:
        # Not only config.data.loader_workers: -1 is automatic, and then a GPU gets its share of the CPUs.
        wanted = 1 + config.data.loader_workers if config.data.loader_workers >= 0 else cpus
        each = launch.cpus_per_worker or max(1, min(wanted, has.cpus_per_gpu()))
    else:
        each = launch.cpus_per_worker or has.most_cpus(min(most, there) if elastic else workers)
    if lack := has.lack(workers, "worker", each, int(use_gpu)):
        raise UserError(
            f"{lack}; pass --launch.workers {max(1, min(config.train.lanes, has.room(each, int(use_gpu))))}, fewer "
            f"--launch.cpus-per-worker, or add nodes with {'GPUs' if use_gpu else 'CPUs'} (--launch.wait-minutes waits "
            "for an autoscaler)"
        )
    resources = {"CPU": each, **({"GPU": 1} if use_gpu else {})}
    return ScalingConfig(
        num_workers=(fewest, most) if elastic else workers,
        use_gpu=use_gpu,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=launch.resize_seconds,
    )


@contextmanager
def _asked_for_nodes(bundles: list[dict[str, float]]) -> Iterator[None]:
    """Show an autoscaler a demand during the with-block.

    It uses a placement group, which ends with this process in every case. A demand by
    `ray.autoscaler.sdk.request_resources` outlives the process: if a job was stopped while it waited, its nodes would
    still be started, kept and paid for.
    """
    group = placement_group(bundles)
    try:
        yield
    finally:
        remove_placement_group(group)


def fewest(workers: ScalingConfig) -> tuple[dict[str, float], str]:
    """Return the resources of the fewest workers, and who needs them in words."""
    number = workers.num_workers[0] if isinstance(workers.num_workers, tuple) else workers.num_workers
    needs = {name: number * amount for name, amount in (workers.resources_per_worker or {}).items()}
    return needs, f"{number} workers need"


@dataclass
class LossWatch:
    """A watch that ends a job whose nodes are permanently gone: Ray Train and Ray Tune would wait for them for ever.

    Use it as a with-block around ``fit()``: it interrupts the main thread, like Ctrl-C, once the
    cluster has had too few resources for ``minutes``. ``gave_up`` then has the message.
    """

    needs: Mapping[str, float]
    """The least that the job can go on with."""
    who: str
    """Who needs them, such as "2 workers need"."""
    minutes: float
    remedy: str = ""
    """What follows in the message."""
    gave_up: str = ""

    def __enter__(self) -> LossWatch:
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="loss watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        enough = time.monotonic()
        while not self._over.wait(LOOK_SECONDS):
            has = ray.cluster_resources()
            if all(has.get(name, 0) >= amount for name, amount in self.needs.items()):
                enough = time.monotonic()
            elif time.monotonic() - enough > 60 * self.minutes:
                found = {name: has.get(name, 0) for name in self.needs}
                self.gave_up = (
                    f"nodes were lost, and for {self.minutes:g} minutes the cluster had only {found} of the "
                    f"{dict(self.needs)} that {self.who}{self.remedy}"
                )
                _thread.interrupt_main()
                return
