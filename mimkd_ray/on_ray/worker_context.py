"""What a worker of Ray knows of its job, and how it is asked to stop and leaves its last words."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray.train

from mimkd_ray import storage
from mimkd_ray.data.loading.stuck_loaders import ASKED_TO_STOP
from mimkd_ray.errors import Interrupted, UserError
from mimkd_ray.json_files import read_if_sound, read_json
from mimkd_ray.on_ray import driver_console
from mimkd_ray.on_ray.prometheus import LiveMetrics
from mimkd_ray.on_ray.remote_errors import ERRORS, kind_of
from mimkd_ray.secret_urls import scrubbed
from mimkd_ray.train.distributed import STOP_SECONDS, Context, Preemption, share_from_first
from mimkd_ray.train.records.run_dir import write_json
from mimkd_ray.train.start_times import StartTimes

logger = logging.getLogger(__name__)

REPORT_SECONDS = 30.0
"""Least seconds between two reports to Ray: each is a barrier that its controller polls every two seconds."""

STOP, STOP_LOOK_SECONDS, OTHERS_LOOK_SECONDS = "stop.json", 1.0, 10.0
"""File that asks the workers of a launch to save and end, and seconds between two checks for it by the first worker and
by each other one, which need not hurry: the first tells them after a step, unless they are what it waits for."""

WRITE_SECONDS = 20.0
"""For the last words of a worker that is stuck."""

ANYBODY = "*"
"""Launch id in that file that means every launch."""


class RayContext(Context):
    """The context of one worker of Ray Train."""

    def __init__(
        self,
        launch_id: str,
        run_dir: str,
        joined: bool,
        times: StartTimes | None = None,
        speaks_through: tuple[Any, float] | None = None,
    ) -> None:
        """``speaks_through``: the driver's mailbox, and the seconds between two states of progress that it shows."""
        self.times = times or StartTimes()
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.launch_id = launch_id
        self._reported = time.monotonic()
        self._joined = joined
        self._stopping = False
        self._heard = threading.Event()
        ASKED_TO_STOP.clear()
        if speaks_through is not None:
            driver_console.speak_through(*speaks_through, self.rank)
        self._live = LiveMetrics() if joined and self.rank == 0 else None
        every = OTHERS_LOOK_SECONDS if self.rank else STOP_LOOK_SECONDS
        threading.Thread(target=self._watch, args=(run_dir, every), name="stop watch", daemon=True).start()

    def _watch(self, run_dir: str, every: float) -> None:
        """Check for a stop request until there is one. A failed check is followed by the next, whatever the error: if
        this thread ended, the job would ignore every later request."""
        url = storage.join(run_dir, STOP)
        failing = False
        while not self._stopping:
            time.sleep(every)
            try:
                asked = read_json(url, ("launch_id",))
                self._stopping = asked is not None and asked["launch_id"] in (self.launch_id, ANYBODY)
                failing = False
            except Exception as error:
                if not failing:
                    text = " ".join(f"{type(error).__name__}: {error}".split())
                    logger.warning(
                        "cannot look for a stop request at %s, and try again every %g s: %s",
                        *(url, every, text),
                    )
                failing = True
        ASKED_TO_STOP.set()
        # The first worker ends with its step, whoever holds that up.
        if self.rank == 0 and not self._heard.wait(STOP_SECONDS):
            self._give_up(run_dir)

    def _give_up(self, run_dir: str) -> None:
        """End this process, where it or another worker is stuck, in a read or a loader that does not answer. Ray starts
        the workers again, and these find the error and end."""
        message = f"asked to stop, and no step has ended in {STOP_SECONDS:.0f} s: ended without saving"
        writing = threading.Thread(
            target=leave_error, args=(run_dir, self.launch_id, Interrupted(message)), daemon=True
        )
        writing.start()
        writing.join(WRITE_SECONDS)  # storage may be what is stuck
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(3)

    def stop_requested(self) -> bool:
        """Return whether the driver was told to stop. The first worker knows first."""
        if self._stopping:
            self._heard.set()
        return self._stopping

    def over(self) -> None:
        """Take note that the job has ended here: no step will."""
        self._heard.set()

    def preemption(self) -> Preemption | None:
        """Return the nodes of this job that their cloud is about to remove, as reported by Ray. This is a barrier."""
        info = ray.train.get_preemption_info() if self._joined else None
        if info is None:
            return None
        return Preemption(
            nodes=tuple(info.preempted_node_ids),
            ranks=tuple(info.preempted_ranks),
            deadline=None if info.deadline_ms is None else info.deadline_ms / 1000,
        )

    def observe(self, run_dir: str, values: Mapping[str, float]) -> None:
        """Export figures to Prometheus if the cluster has one; the run is named by its directory."""
        if self._live is not None:
            self._live.show(run_dir.rstrip("/").rpartition("/")[2], values)

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Show metrics in Ray's dashboard; all ranks agree on the time."""
        due = share_from_first(time.monotonic() - self._reported > REPORT_SECONDS)
        if due:
            ray.train.report(dict(metrics))
            self._reported = time.monotonic()


@contextmanager
def context_of(setup: Mapping[str, Any]) -> Iterator[RayContext | None]:
    """A with-block with the context of a worker. An error that a restart does not cure is written to the run directory
    for the driver. None for the restart of a worker that was killed as it wrote that: it ends, and the driver reports
    the error."""
    times = StartTimes(setup["timeline"])
    times.mark("worker")
    context = RayContext(setup["launch_id"], setup["run_dir"], setup["joined"], times, setup.get("console"))
    earlier = read_if_sound(storage.join(setup["run_dir"], "error.json"), ("launch_id",))
    try:
        yield None if earlier is not None and earlier["launch_id"] == context.launch_id else context
    except ERRORS as error:
        leave_error(setup["run_dir"], context.launch_id, error)
        if not isinstance(error, Interrupted):  # then all workers end together, and nothing has failed
            raise
    finally:
        context.over()


def leave_error(run_dir: str, launch_id: str, error: Exception) -> None:
    """Write down what the driver is to report."""
    message = scrubbed(str(error))
    # If the disk is full, or the store is away, Ray's report must suffice.
    with suppress(UserError, storage.StorageError), storage.hurried():
        write_json(
            storage.join(run_dir, "error.json"),
            {"launch_id": launch_id, "kind": kind_of(error), "message": message},
        )
