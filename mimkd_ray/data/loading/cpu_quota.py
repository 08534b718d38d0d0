"""The processor cores that this process may use, by its affinity and a container's CPU quota."""

from __future__ import annotations

import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "share period" in microseconds, or "max period"


def usable_cores() -> int:
    """Return the number of whole cores that this process may use, at least 1.

    In a container with a CPU quota this is less than the machine's cores (`os.cpu_count`): the kernel stops processes
    and threads beyond the quota for the rest of each period.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if QUOTA.is_file():
        share, _, period = QUOTA.read_text().strip().partition(" ")
        if share.isdecimal():
            cores = min(cores, max(1, int(share) // int(period)))
    return cores
