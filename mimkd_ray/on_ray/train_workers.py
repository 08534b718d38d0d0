"""Training under Ray Train: one worker group, restarted by Ray, resumed from the run's own checkpoints."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, TrainingFailedError, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from mimkd_ray import console, storage
from mimkd_ray.config import Config
from mimkd_ray.config.form.json_form import from_dict, to_dict
from mimkd_ray.data.loading.threads import CHOSEN, use_threads
from mimkd_ray.errors import UserError
from mimkd_ray.json_files import read_if_sound, read_json
from mimkd_ray.local_files import scratch_folder
from mimkd_ray.on_ray import driver_console
from mimkd_ray.on_ray.file_rendezvous import OneMachine
from mimkd_ray.on_ray.nodes.placement import OWN_MINUTES, LossWatch, fewest, scaling
from mimkd_ray.on_ray.remote_errors import ERRORS, raise_told
from mimkd_ray.on_ray.worker_context import STOP, context_of
from mimkd_ray.secret_urls import Carried
from mimkd_ray.signals import handled
from mimkd_ray.train.distributed import GROUP_SECONDS
from mimkd_ray.train.job import run_job
from mimkd_ray.train.records.run_dir import write_json
from mimkd_ray.train.start_times import StartTimes

logger = logging.getLogger(__name__)


class EndAtOnce(UserCallback):
    """A callback that ends the job at the first error that a restart does not cure.

    Ray Train would restart the workers after any of their errors, up to `max_failures` times; an error of a callback in
    its controller ends the run.
    """

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Raise such an error in the controller, after a worker has raised it."""
        for error in worker_exceptions.values():
            if isinstance(error, ERRORS):
                raise error


def worker(setup: dict[str, Any]) -> None:
    """Run training in a Ray worker."""
    with context_of(setup) as context:
        if context is None:
            return
        config = from_dict(Config, setup["config"])
        storage.be_patient(config.storage.patience_minutes)
        if context.device.type == "cpu":  # Ray has set the variable to the CPUs of this worker where nobody else had
            use_threads(config.data, setup["threads_given"])
        run_job(config, context, setup["run_dir"])


def trainer_class(ranged: bool) -> type[TorchTrainer]:
    """Return Ray's own trainer, or for a range of workers the one of elastic.py, which restarts sooner after a loss. If
    that does not support this Ray, log it and return Ray's own."""
    if ranged:
        try:
            from mimkd_ray.on_ray.nodes import elastic

            elastic.check()
            return elastic.ElasticTrainer
        except ImportError as error:
            logger.warning("after a lost node training goes on up to 40 s later than with ray 2.60: %s", error)
    return TorchTrainer


@contextmanager
def forwarded_stop(run_dir: str, launch_id: str, gave_up: Callable[[], str] = str) -> Iterator[None]:
    """Make SIGTERM and Ctrl-C ask the workers to save and end during the with-block, by a file in the run directory. A
    second Ctrl-C, or one when the watch has ``gave_up``, raises KeyboardInterrupt. For the main thread."""
    asked, told = threading.Event(), ExitStack()

    def ask() -> None:
        try:
            write_json(storage.join(run_dir, STOP), {"launch_id": launch_id})
        except Exception as error:
            asked.clear()
            console.line(f"the workers do not know that they are to stop ({error}): another SIGTERM asks them again")

    def stop(more: str = "") -> None:
        if not asked.is_set():
            asked.set()
            console.line(f"stopping: the workers are asked to save and end{more}")
            told.enter_context(console.phase("waiting for the workers to save and end", said=False))
            threading.Thread(target=ask, name="stop").start()  # storage may wait, but a signal handler must not

    interrupts = 0

    def on_interrupt(*_: object) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1 or gave_up():
            raise KeyboardInterrupt
        stop("; a second Ctrl-C ends at once")

    with told, handled({signal.SIGINT: on_interrupt, signal.SIGTERM: lambda *_: stop()}):
        yield


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
    with joined(config, run_dir, times) as own:
        return fit_workers(config, run_dir, own, times)


@contextmanager
def joined(config: Config, run_dir: str, times: StartTimes) -> Iterator[bool]:
    """A with-block in which Ray Train starts workers. Yields whether Ray was started here."""
    launch, options = config.launch, {"state_api": True, "ignore_reinit_error": True}
    with driver_console.joined(launch.address, "--launch.address", run_dir, launch.verbose, **options) as own:
        times.mark("connected")
        with console.phase("starting workers"):
            yield own


def fit_workers(config: Config, run_dir: str, own: bool, times: StartTimes | None = None) -> dict[str, Any]:
    """Train within the connected Ray and return the result. ``own``: this process started it. Outside the main thread,
    signals are not handled and lost nodes are waited for without limit."""
    fit(worker, {"config": to_dict(config)}, config, run_dir, own, times)
    result = read_json(storage.join(run_dir, "result.json"))
    if result is None:
        raise UserError(
            f"the workers ended without a result in {run_dir}: on several nodes --run.root must be a folder or URL "
            "that all of them see, such as s3://bucket/runs"
        )
    return result


def fit(
    work: Callable[[dict[str, Any]], None],
    setup: Mapping[str, Any],
    config: Config,
    run_dir: str,
    own: bool,
    times: StartTimes | None = None,
) -> None:
    """Do ``work(setup)`` in the workers that ``config`` asks for. More is in their setup: see :func:`worker`. Raises
    the errors that they leave in ``run_dir``."""
    launch_id = uuid.uuid4().hex
    # Ray needs a place for its own snapshot. Only our checkpoints are used, so it is deleted.
    scratch = scratch_folder("ray")
    workers = scaling(config, own)
    here, group = own and len(ray.nodes()) == 1, {"timeout_s": GROUP_SECONDS}
    remedy = (
        ": add nodes and give it again: it goes on from the last checkpoint; or pass a range of workers, such as "
        "--launch.workers 1..8"
    )
    watch = LossWatch(*fewest(workers), OWN_MINUTES if own else config.launch.lost_minutes, remedy)
    try:
        with ExitStack() as stack:
            mailbox = stack.enter_context(driver_console.heard())
            trainer = trainer_class(isinstance(workers.num_workers, tuple))(
                work,
                train_loop_config={
                    **setup,
                    "run_dir": run_dir,
                    "launch_id": launch_id,
                    "joined": not own,
                    "threads_given": CHOSEN in os.environ,
                    "secrets": Carried(),
                    "timeline": times.marks() if times is not None else {},
                    "console": (mailbox, console.current().every),
                },
                scaling_config=workers,
                torch_config=OneMachine(**group, folder=scratch) if here else TorchConfig(**group),
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
        if isinstance(cause, ERRORS):
            raise cause from None
        raise
    except KeyboardInterrupt:
        if watch.gave_up:
            raise UserError(watch.gave_up) from None
        raise KeyboardInterrupt from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _raise_known(run_dir, launch_id)


def _raise_known(run_dir: str, launch_id: str) -> None:
    """Raise the error that a worker of this launch left behind, if any."""
    error = read_if_sound(storage.join(run_dir, "error.json"), ("launch_id", "kind", "message"))
    if error is not None and error["launch_id"] == launch_id:
        raise_told(error["kind"], error["message"])
