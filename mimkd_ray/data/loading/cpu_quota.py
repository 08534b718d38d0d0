"""The processor cores that this process may use, by its affinity and a container's CPU quota."""

from __future__ import annotations

import os
from pathlib import Path

from mimkd_ray.errors import UserError

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "share period" in microseconds, or "max period"
QUOTA_V1 = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")  # -1: none


def usable_cores() -> int:
    """Return the number of whole cores that this process may use, at least 1.

    In a container with a CPU quota this is less than the machine's cores (`os.cpu_count`): the kernel stops processes
    and threads beyond the quota for the rest of each period.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share, period = _quota()
    if share.isdecimal() and period.isdecimal():
        cores = min(cores, max(1, int(share) // int(period)))
    return cores


def _quota() -> tuple[str, str]:
    if QUOTA.is_file():
        share, _, period = QUOTA.read_text().strip().partition(" ")
        return share, period
    if all(file.is_file() for file in QUOTA_V1):
        share, period = (file.read_text().strip() for file in QUOTA_V1)
        return share, period
    return "", ""


def local_world_size() -> int:
    """Return the number of training workers on this machine, from the launcher's LOCAL_WORLD_SIZE; at least 1."""
    value = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"LOCAL_WORLD_SIZE is '{value}' in the environment: give the training workers of this machine")
    return int(value)
