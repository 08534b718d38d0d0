"""Section `launch`: the launcher and the number of workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mimkd_ray.config.form.values import FROM_0, check_values, worker_range
from mimkd_ray.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """The launcher and the number of workers."""

    backend: Literal["ray", "local"] = "ray"
    """ray: Ray Train. local: this process, or the process group that torchrun created."""
    workers: int | str = 0
    """Training workers; 0: one per GPU (else CPU) of the cluster, at most `train.lanes`; 2..8: any number in that
    range, as nodes join and leave."""
    cpus_per_worker: int = 0
    """CPUs that a worker reserves; 0: an equal share on CPU; with a GPU, 1 + data.loader_workers."""
    gpu: Literal["auto", "on", "off"] = "auto"
    """Give each worker a GPU; auto: if the cluster has any."""
    address: str = ""
    """Address of a running Ray cluster; unset: RAY_ADDRESS, else this process starts Ray."""
    verbose: bool = False
    """Show what Ray and its workers print themselves, which else goes to ray.log in the run directory. --verbose on the
    command line is the same."""
    max_failures: int = 3
    """Most restarts of a failed worker group; each one resumes from the last checkpoint."""
    max_preemptions: int = -1
    """Most restarts because a node was taken away with notice; -1: no limit."""
    resize_seconds: float = 60.0
    """Seconds between two checks for more nodes, with a range of workers. A resize is a restart from a checkpoint."""
    wait_minutes: float = 0.0
    """Minutes to wait at the start for resources that the joined cluster lacks, such as nodes from an autoscaler, or
    that other jobs hold."""
    lost_minutes: float = 30.0
    """Minutes after which the run gives up if there are too few nodes for the fewest workers."""

    def __post_init__(self) -> None:
        waits = {"resize_seconds": FROM_0, "wait_minutes": FROM_0, "lost_minutes": FROM_0}
        check_values(self, "launch", cpus_per_worker=(0, 4096), max_failures=FROM_0, **waits)
        worker_range("launch.workers", self.workers)
        if self.max_preemptions < -1:
            raise UserError(f"launch.max_preemptions is {self.max_preemptions}: give 0 or more, or -1 for no limit")

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers; (0, 0) if the launcher chooses."""
        return worker_range("launch.workers", self.workers)
