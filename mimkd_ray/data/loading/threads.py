"""Threads of a training process on a CPU: its share of the cores."""

from __future__ import annotations

import os

from mimkd_ray.config import DataConfig
from mimkd_ray.data.loading.cpu_quota import local_world_size, usable_cores
from mimkd_ray.errors import count

CHOSEN = "OMP_NUM_THREADS"
"""The environment variable by which somebody has chosen already: a user, torchrun, or the node of a cluster."""

SMALL_SIDE = 16
"""Images with a side of fewer pixels: the maps of a network are so small that a second thread costs more time than it
saves (benchmarks/threads.py, at 8 px)."""


def loaders(data: DataConfig, share: int) -> int:
    """Return the loader processes of a worker with a ``share`` of the cores, as the loader starts them. A set that is
    in memory needs none; before it is opened the digits are known to be."""
    if data.loader_workers >= 0:
        return data.loader_workers
    return 0 if data.root == "digits" else max(1, share - 1)


def threads_for(data: DataConfig, share: int) -> int:
    """Return the threads of a worker: its whole share of the cores, or one for small images. Loader processes take
    little of it, because on a CPU a network takes many times as long as decoding."""
    return 1 if data.image_size < SMALL_SIDE else share


def use_threads(data: DataConfig, given: bool) -> None:
    """Give this process its threads, unless that was ``given``; never more than it has."""
    import torch  # what a run says at its beginning does not need it

    if not given:
        torch.set_num_threads(min(torch.get_num_threads(), threads_for(data, _share())))


def told(data: DataConfig) -> str:
    """Return in words what a plain process, or one of torchrun, uses of its machine."""
    given = os.environ.get(CHOSEN)
    threads = f"{CHOSEN} {given}" if given else count(threads_for(data, _share()), "thread")
    decoding = count(loaders(data, _share()), "loader process", "loader processes")
    each = " each" if local_world_size() > 1 else ""
    return f"{threads} and {decoding}{each}, {count(usable_cores(), 'core')} usable"


def told_by_ray(data: DataConfig, cpus: int, workers: int = 0, joined: bool = False) -> str:
    """Return in words what each of the ``workers`` of Ray uses, which reserves so many CPUs; 0: not known yet.
    ``joined``: its nodes were there before, and do not have this process's environment, in which Ray sets the variable
    to 1 if the job was submitted."""
    given = os.environ.get(CHOSEN)
    number = cpus if given else threads_for(data, cpus)
    known = count(number, "thread") if number else "a thread per CPU"
    threads = f"{CHOSEN} {given}" if given and not joined else known
    each = "" if workers == 1 else " each"
    if data.loader_workers < 0 and loaders(data, 1):
        return f"{threads}{each}, loader processes by the cores of its node"
    return f"{threads} and {count(loaders(data, 1), 'loader process', 'loader processes')}{each}"


def _share() -> int:
    return max(1, usable_cores() // local_world_size())
