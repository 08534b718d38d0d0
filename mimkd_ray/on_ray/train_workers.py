"""Training under Ray Train: one worker group, restarted by Ray, resumed from the run's own checkpoints."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, TrainingFailedError, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from mimkd_ray import console, storage
from mimkd_ray.config import Config
from mimkd_ray.config.json_form import from_dict, to_dict
from mimkd_ray.data.loading.threads import CHOSEN, use_threads
from mimkd_ray.errors import DamagedDataError, Interrupted, NonFiniteLossError, UserError
from mimkd_ray.json_files import read_if_sound, read_json
from mimkd_ray.local_files import scratch_folder
from mimkd_ray.on_ray import driver_console
from mimkd_ray.on_ray.cluster import connect
from mimkd_ray.on_ray.environment import cluster_address
from mimkd_ray.on_ray.placement import OWN_MINUTES, LossWatch, fewest, scaling
from mimkd_ray.on_ray.prometheus import LiveMetrics
from mimkd_ray.secret_urls import Carried, scrubbed
from mimkd_ray.train.distributed import GROUP_SECONDS, STOP_SECONDS, Preemption, share_from_first
from mimkd_ray.train.records.run_dir import write_json
from mimkd_ray.train.start_times import StartTimes
from mimkd_ray.train.worker import run_job

logger = logging.getLogger(__name__)

REPORT_SECONDS = 30.0
"""Least seconds between two reports to Ray: each is a barrier that its controller polls every two seconds."""

ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        UserError,
        DamagedDataError,
        NonFiniteLossError,
        Interrupted,
        storage.StorageError,
        storage.AccessError,
    )
}
"""Errors that a restart does not cure, sent to the driver by name."""

STOP, STOP_LOOK_SECONDS = "stop.json", 1.0
"""File that asks the workers of a launch to save and end, and seconds between two checks for it by the first worker."""

WRITE_SECONDS = 20.0
"""For the last words of a worker that is stuck."""

ANYBODY = "*"
"""Launch id in that file that means every launch."""


class RayContext:
    """The context of one worker of Ray Train."""

    reports_are_final = False

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
        if speaks_through is not None:
            driver_console.speak_through(*speaks_through, self.rank)
        self._live = LiveMetrics() if joined and self.rank == 0 else None
        if self.rank == 0:
            threading.Thread(target=self._watch, args=(run_dir,), name="stop watch", daemon=True).start()

    def _watch(self, run_dir: str) -> None:
        """Check for a stop request until there is one. A failed check is followed by the next, whatever the error: if
        this thread ended, the job would ignore every later request."""
        url = storage.join(run_dir, STOP)
        failing = False
        while not self._stopping:
            time.sleep(STOP_LOOK_SECONDS)
            try:
                asked = read_json(url, ("launch_id",))
                self._stopping = asked is not None and asked["launch_id"] in (self.launch_id, ANYBODY)
                failing = False
            except Exception as error:
                if not failing:
                    text = " ".join(f"{type(error).__name__}: {error}".split())
                    logger.warning(
                        "cannot look for a stop request at %s, and try again every %g s: %s",
                        *(url, STOP_LOOK_SECONDS, text),
                    )
                failing = True
        if not self._heard.wait(STOP_SECONDS):
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
        """Return whether the driver was told to stop. Only the first worker knows."""
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


class EndAtOnce(UserCallback):
    """A callback that ends the job at the first error that a restart does not cure.

    Ray Train would restart the workers after any of their errors, up to `max_failures` times; an error of a callback in
    its controller ends the run.
    """

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Raise such an error in the controller, after a worker has raised it."""
        for error in worker_exceptions.values():
            if isinstance(error, tuple(ERRORS.values())):
                raise error


def worker(setup: dict[str, Any]) -> None:
    """Run training in a Ray worker. An error that a restart does not cure is written to the run directory for the
    driver."""
    times = StartTimes(setup["timeline"])
    times.mark("worker")
    context = RayContext(setup["launch_id"], setup["run_dir"], setup["joined"], times, setup.get("console"))
    url = storage.join(setup["run_dir"], "error.json")
    earlier = read_if_sound(url, ("launch_id",))
    if earlier is not None and earlier["launch_id"] == context.launch_id:
        return  # restart of a worker that was killed as it wrote the error: end, and let the driver report it
    config = from_dict(Config, setup["config"])
    if context.device.type == "cpu":  # Ray has set the variable to the CPUs of this worker where nobody else had
        use_threads(config.data, setup["threads_given"])
    try:
        run_job(config, context, setup["run_dir"])
    except tuple(ERRORS.values()) as error:
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
            {"launch_id": launch_id, "kind": type(error).__name__, "message": message},
        )


def trainer_class(ranged: bool) -> type[TorchTrainer]:
    """Return Ray's own trainer, or for a range of workers the one of elastic.py, which restarts sooner after a loss. If
    that does not support this Ray, log it and return Ray's own."""
    if ranged:
        try:
            from mimkd_ray.on_ray import elastic

            elastic.check()
            return elastic.ElasticTrainer
        except ImportError as error:
            logger.warning("after a lost node training goes on up to 40 s later than with ray 2.60: %s", error)
    return TorchTrainer


@contextmanager
def forwarded_stop(run_dir: str, launch_id: str, gave_up: Callable[[], str] = str) -> Iterator[None]:
    """Make SIGTERM and Ctrl-C ask the workers to save and end during the with-block, by a file in the run directory. A
    second Ctrl-C, or one when the watch has ``gave_up``, raises KeyboardInterrupt. For the main thread."""
    asked = threading.Event()

    def ask() -> None:
        write_json(storage.join(run_dir, STOP), {"launch_id": launch_id})

    def stop(more: str = "") -> None:
        if not asked.is_set():
            asked.set()
            console.line(f"stopping: the workers are asked to save and end{more}")
            threading.Thread(target=ask, name="stop").start()  # storage may wait, but a signal handler must not

    interrupts = 0

    def on_interrupt(*_: object) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1 or gave_up():
            raise KeyboardInterrupt
        stop("; a second Ctrl-C ends at once")

    before = {signal.SIGINT: signal.signal(signal.SIGINT, on_interrupt)}
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda *_: stop())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def beside_signals(work: Callable[[], object]) -> None:
    """Do the work in a thread and wait for it: this one stays free for signals, for which Ray Train, in the main
    thread, would put a handler of its own in the place of ours."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="Ray Train", daemon=True).start()
    done.result()


def run_ray(config: Config, run_dir: str, times: StartTimes) -> dict[str, Any]:
    """Run the job on Ray Train workers, of a cluster or of a Ray started here, and return its result."""
    with driver_console.ray_in_file(run_dir, config.launch.verbose):
        with console.phase("joining the Ray cluster" if cluster_address(config.launch.address) else "starting Ray"):
            own = connect(config.launch.address, "--launch.address", state_api=True, ignore_reinit_error=True)
        times.mark("connected")
        try:
            with console.phase("starting workers"):
                return fit_workers(config, run_dir, own, times)
        finally:
            if own:
                with console.phase("ending Ray", said=False):
                    ray.shutdown()


def fit_workers(config: Config, run_dir: str, own: bool, times: StartTimes | None = None) -> dict[str, Any]:
    """Run the job within the connected Ray and return its result. ``own``: this process started it. Outside the main
    thread, signals are not handled and lost nodes are waited for without limit."""
    launch_id = uuid.uuid4().hex
    # Ray needs a place for its own snapshot. Only our checkpoints are used, so it is deleted.
    scratch = scratch_folder("ray")
    workers = scaling(config, own)
    remedy = (
        ": add nodes and give it again: it goes on from the last checkpoint; or pass a range of workers, such as "
        "--launch.workers 1..8"
    )
    watch = LossWatch(*fewest(workers), OWN_MINUTES if own else config.launch.lost_minutes, remedy)
    try:
        with ExitStack() as stack:
            mailbox = stack.enter_context(driver_console.heard())
            trainer = trainer_class(isinstance(workers.num_workers, tuple))(
                worker,
                train_loop_config={
                    "config": to_dict(config),
                    "run_dir": run_dir,
                    "launch_id": launch_id,
                    "joined": not own,
                    "threads_given": CHOSEN in os.environ,
                    "secrets": Carried(),
                    "timeline": times.marks() if times is not None else {},
                    "console": (mailbox, console.current().every),
                },
                scaling_config=workers,
                torch_config=TorchConfig(timeout_s=GROUP_SECONDS),
                run_config=RunConfig(
                    name=launch_id,
                    storage_path=scratch,
                    callbacks=[EndAtOnce()],
                    failure_config=FailureConfig(
                        max_failures=config.launch.max_failures,
                        max_preemption_failures=config.launch.max_preemptions,
                    ),
                ),
            )
            if threading.current_thread() is threading.main_thread():
                stack.enter_context(forwarded_stop(run_dir, launch_id, lambda: watch.gave_up))
                stack.enter_context(watch)
                beside_signals(trainer.fit)
            else:
                trainer.fit()
    except TrainingFailedError as error:
        cause = getattr(error, "controller_failure", None)  # the error that EndAtOnce raised
        if not isinstance(cause, storage.StorageError):  # then it could not write it down
            _raise_known(run_dir, launch_id)
        if isinstance(cause, Exception) and type(cause).__name__ in ERRORS:
            raise cause from None
        raise
    except KeyboardInterrupt:
        if watch.gave_up:
            raise UserError(watch.gave_up) from None
        raise KeyboardInterrupt from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _raise_known(run_dir, launch_id)
    result = read_json(storage.join(run_dir, "result.json"))
    if result is None:
        raise UserError(
            f"the workers ended without a result in {run_dir}: on several nodes --run.root must be a folder or URL "
            "that all of them see, such as s3://bucket/runs"
        )
    return result


def _raise_known(run_dir: str, launch_id: str) -> None:
    """Raise the error that a worker of this launch left behind, if any."""
    error = read_if_sound(storage.join(run_dir, "error.json"), ("launch_id", "kind", "message"))
    if error is not None and error["launch_id"] == launch_id:
        raise ERRORS[error["kind"]](error["message"])
