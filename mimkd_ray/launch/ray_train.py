"""The loop under Ray Train: one worker group, restarted by Ray, resumed by the run's own checkpoints."""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from mimkd_ray import storage
from mimkd_ray.errors import DamagedDataError, NonFiniteLossError, UserError
from mimkd_ray.launch.environment import cluster_address
from mimkd_ray.train import timeline
from mimkd_ray.train.config import Config, from_dict, to_dict
from mimkd_ray.train.context import share_from_first
from mimkd_ray.train.files import read_json, write_json
from mimkd_ray.train.job import run_job

REPORT_SECONDS = 30.0
"""A report to Ray is a barrier that its controller polls every two seconds, so reports are rationed."""

ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (UserError, DamagedDataError, NonFiniteLossError, storage.StorageError)
}
"""Errors that a restart cannot mend; they travel to the driver by name."""

EMBEDDED_READ_IN = "2.60."
"""The Ray version whose inside launch/embedded.py was written for."""


class RayContext:
    """One worker of Ray Train."""

    def __init__(self, launch_id: str) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.launch_id = launch_id
        self._reported = time.monotonic()

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Show metrics in Ray's dashboard; all ranks agree on when."""
        due = share_from_first(time.monotonic() - self._reported > REPORT_SECONDS)
        if due:
            ray.train.report(dict(metrics))
            self._reported = time.monotonic()


def worker(setup: dict[str, Any]) -> None:
    """What each Ray worker runs. An error that a restart cannot mend is left in the run directory for the driver."""
    timeline.begin(setup["timeline"])
    timeline.mark("worker")
    context = RayContext(setup["launch_id"])
    url = storage.join(setup["run_dir"], "error.json")
    earlier = read_json(url)
    if earlier is not None and earlier["launch_id"] == context.launch_id:
        return  # this is the restart after it: end, so that the driver can tell
    try:
        run_job(from_dict(Config, setup["config"]), context, setup["run_dir"])
    except tuple(ERRORS.values()) as error:
        write_json(url, {"launch_id": context.launch_id, "kind": type(error).__name__, "message": str(error)})
        raise


def connect(config: Config) -> bool:
    """Join the cluster that is named, or start a Ray of our own. Returns whether it is our own."""
    address = cluster_address(config.launch.address)
    if not address:
        ray.init(address="local", include_dashboard=False, logging_level="warning", ignore_reinit_error=True)
        return True
    try:
        ray.init(address=address, logging_level="warning", ignore_reinit_error=True)
    except ConnectionError as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({error}): check --launch.address or RAY_ADDRESS (host:port of the "
            "head, or `auto`), or unset both for a Ray of this process's own"
        ) from None
    return False


def trainer_class(own: bool) -> type[TorchTrainer]:
    """The trainer for the cluster at hand: with a Ray of our own, one that starts sooner."""
    if own and ray.__version__.startswith(EMBEDDED_READ_IN):
        from mimkd_ray.launch.embedded import EmbeddedTrainer  # below Ray's public surface

        return EmbeddedTrainer
    return TorchTrainer


def scaling(config: Config) -> ScalingConfig:
    """Workers and what each reserves, from what the cluster has. Too little is a UserError: Ray would wait for ever."""
    has = ray.cluster_resources()
    cpus, gpus = int(has.get("CPU", 0)), int(has.get("GPU", 0))
    launch = config.launch
    use_gpu = launch.gpu == "on" or (launch.gpu == "auto" and gpus > 0)
    most = gpus if use_gpu else cpus
    workers = launch.workers or min(config.train.lanes, most)
    if use_gpu:
        each = launch.cpus_per_worker or max(1, min(1 + config.data.loader_workers, cpus // max(workers, 1)))
    else:
        each = launch.cpus_per_worker or max(1, cpus // max(workers, 1))
    if workers < 1 or workers > most or workers * each > cpus:
        kind = "GPUs" if use_gpu else "CPUs"
        raise UserError(
            f"{workers} workers with {each} CPUs{' and 1 GPU' if use_gpu else ''} each do not fit: the cluster has "
            f"{cpus} CPUs and {gpus} GPUs; pass --launch.workers {max(1, min(config.train.lanes, most))}, fewer "
            f"--launch.cpus-per-worker, or add nodes with {kind}"
        )
    resources = {"CPU": each, **({"GPU": 1} if use_gpu else {})}
    return ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=resources)


def run_ray(config: Config, run_dir: str) -> dict[str, Any]:
    """Run the job on Ray Train workers and return its result."""
    own = connect(config)
    timeline.mark("connected")
    launch_id = uuid.uuid4().hex
    # Ray wants a place for its own snapshot. Ours are the only checkpoints, so it is thrown away.
    scratch = tempfile.mkdtemp(prefix="mimkd-ray-")
    try:
        trainer = trainer_class(own)(
            worker,
            train_loop_config={
                "config": to_dict(config),
                "run_dir": run_dir,
                "launch_id": launch_id,
                "timeline": timeline.marks(),
            },
            scaling_config=scaling(config),
            run_config=RunConfig(
                name=launch_id,
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=config.launch.max_failures),
            ),
        )
        trainer.fit()
    except TrainingFailedError:
        _raise_known(run_dir, launch_id)
        raise
    except SystemExit:
        raise KeyboardInterrupt from None  # Ray's handler of Ctrl-C exits, and with status 0
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if own:
            ray.shutdown()
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
    error = read_json(storage.join(run_dir, "error.json"))
    if error is not None and error["launch_id"] == launch_id:
        raise ERRORS[error["kind"]](error["message"])
