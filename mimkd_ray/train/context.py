"""What the training loop knows of the world outside, and the few collectives it needs.

`launch/local.py` implements :class:`Context` for a plain process and for torchrun, `launch/ray_train.py` for Ray
Train. The process group, where there is one, is set up by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Context(Protocol):
    """The loop's only view of who runs it."""

    rank: int
    world_size: int
    device: torch.device
    #: Names this start of the job in files; the same for every rank and every restart by the launcher.
    launch_id: str

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Hand metrics to the launcher's own dashboard. Called by all ranks after an evaluation; may be slow."""


def is_distributed() -> bool:
    """Whether a process group is up."""
    return dist.is_available() and dist.is_initialized()


def all_sum(tensor: Tensor) -> Tensor:
    """Sum of ``tensor`` over all ranks, in place; the tensor itself for one process."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait for all ranks. An all-reduce, because a NCCL barrier must be told its device."""
    if is_distributed():
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        dist.all_reduce(torch.zeros((), device=device))


def share_from_first(value: Any) -> Any:
    """Rank 0's ``value`` on every rank (small, picklable)."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
