"""Training in this process, or in the process group that torchrun created."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mimkd_ray import console
from mimkd_ray.config import Config, LaunchConfig
from mimkd_ray.data.loading.stuck_loaders import ASKED_TO_STOP
from mimkd_ray.data.loading.threads import CHOSEN, use_threads
from mimkd_ray.data.sources.own_dataset import OwnData
from mimkd_ray.errors import UserError, count
from mimkd_ray.signals import handled
from mimkd_ray.train.distributed import GROUP_SECONDS, STOP_SECONDS, Context, share_from_first, stay_here
from mimkd_ray.train.job import do_job
from mimkd_ray.train.start_times import StartTimes

TWICE_SECONDS = 1.0
"""Ctrl-C reaches a process of torchrun twice: from the terminal, and passed on by torchrun."""


class LocalContext(Context):
    """The context of a plain process, or of one rank of torchrun. Batch systems announce its end by SIGTERM alone."""

    def __init__(
        self,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        launch_id: str = "",
        times: StartTimes | None = None,
    ) -> None:
        self.times = times or StartTimes()
        self.rank, self.world_size, self.device = rank, world_size, device
        self.launch_id = launch_id or uuid.uuid4().hex
        self._stopping = False
        self._heard = threading.Event()

    @contextmanager
    def stops_on_signals(self) -> Iterator[None]:
        """A with-block in which SIGTERM and Ctrl-C are requests to save and end; a second Ctrl-C ends at once. For the
        main thread; in another one signals stay as they are. A process that is stuck, in a read or a loader that does
        not answer, ends without saving after STOP_SECONDS."""
        asked = [float("inf")]
        ASKED_TO_STOP.clear()

        def ask(*_: object) -> None:
            self._stopping = True
            threading.Thread(target=self._give_up, name="stop limit", daemon=True).start()

        def on_interrupt(*_: object) -> None:
            now = time.monotonic()
            if now - asked[0] > TWICE_SECONDS:
                raise KeyboardInterrupt
            if not self._stopping:
                console.line("stopping: saving after this step; a second Ctrl-C ends at once")
                ask()
            asked[0] = min(asked[0], now)

        try:
            with handled({signal.SIGINT: on_interrupt, signal.SIGTERM: ask}):
                yield
        finally:
            ASKED_TO_STOP.clear()  # a notebook goes on

    def _give_up(self) -> None:
        ASKED_TO_STOP.set()
        if self._heard.wait(STOP_SECONDS):
            return
        console.line(
            f"asked to stop, and no step has ended in {STOP_SECONDS:.0f} s: ended without saving; the same command "
            "goes on from the last checkpoint"
        )
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(3)

    def stop_requested(self) -> bool:
        """Return whether SIGTERM or Ctrl-C was received."""
        if self._stopping:
            self._heard.set()
        return self._stopping


def pick_device(launch: LaunchConfig, local_rank: int) -> torch.device:
    """Return the GPU of this process, or the CPU. Raises UserError for a GPU that is not there."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if launch.gpu == "off" or (launch.gpu == "auto" and not there):
        return torch.device("cpu")
    if local_rank >= there:
        raise UserError(
            f"launch.gpu is {launch.gpu}, and PyTorch {torch.__version__} sees {count(there, 'GPU')} on this machine, "
            f"of which this process needs number {local_rank + 1}: start fewer processes, install a driver or a "
            "PyTorch for it, or pass --launch.gpu off"
        )
    return torch.device("cuda", local_rank)


def under_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def local_context(launch: LaunchConfig, times: StartTimes) -> Iterator[LocalContext]:
    """Yield the context of the process group that torchrun created, or of a plain process. ``times``: the stages of
    this start so far."""
    if not under_torchrun():
        yield LocalContext(pick_device(launch, 0), times=times)
        return
    device = pick_device(launch, int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        stay_here()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=GROUP_SECONDS))
    try:
        launch_id = share_from_first(uuid.uuid4().hex)
        if dist.get_rank():
            console.use(console.Nobody())
        yield LocalContext(device, dist.get_rank(), dist.get_world_size(), launch_id, times)
    finally:
        dist.destroy_process_group()


def run_local(config: Config, context: LocalContext, run_dir: str, given: OwnData | None = None) -> dict[str, Any]:
    """Run a job that has begun and has no result in this process; under torchrun, as one rank of many. ``given``: data
    sets in place of ``data.root``."""
    context.times.mark("worker")
    if context.device.type == "cpu":
        use_threads(config.data, CHOSEN in os.environ)
    with context.stops_on_signals():
        return do_job(config, context, run_dir, given)
