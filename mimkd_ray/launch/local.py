"""The loop in this process, or in the process group that torchrun made."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from mimkd_ray.train import timeline
from mimkd_ray.train.config import Config, LaunchConfig
from mimkd_ray.train.context import share_from_first
from mimkd_ray.train.job import run_job


class LocalContext:
    """A plain process, or one rank of torchrun. It has no dashboard to report to."""

    def __init__(self, device: torch.device, rank: int = 0, world_size: int = 1, launch_id: str = "") -> None:
        self.rank, self.world_size, self.device = rank, world_size, device
        self.launch_id = launch_id or uuid.uuid4().hex

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Nobody listens: metrics.jsonl and TensorBoard have it all."""


def pick_device(launch: LaunchConfig, local_rank: int) -> torch.device:
    """The GPU of this process, or the CPU."""
    if launch.gpu == "on" or (launch.gpu == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_local(config: Config, run_dir: str) -> dict[str, Any]:
    """Run the job here; under torchrun, as one rank of many."""
    if not under_torchrun():
        timeline.mark("worker")
        return run_job(config, LocalContext(pick_device(config.launch, 0)), run_dir)
    device = pick_device(config.launch, int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    timeline.mark("worker")
    try:
        launch_id = share_from_first(uuid.uuid4().hex)
        context = LocalContext(device, dist.get_rank(), dist.get_world_size(), launch_id)
        return run_job(config, context, run_dir)
    finally:
        dist.destroy_process_group()
