"""The training loop's view of the outside (:class:`Context`), and the collectives that it needs.

`cli/local_launch.py` has a :class:`Context` for a plain process and for torchrun, `on_ray/worker_context.py` for
Ray Train. They set up the process group, if there is one.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mimkd_ray.errors import DamagedDataError, UserError
from mimkd_ray.storage import StorageError
from mimkd_ray.train.start_times import StartTimes

T = TypeVar("T")

GROUP_SECONDS = 120
"""A worker that waits this long for the others in a collective gives up: one of them is gone."""

STOP_SECONDS = 120.0
"""From a request to stop to the end without saving. A long evaluation takes its time, and saves at its end."""


@dataclass(frozen=True, kw_only=True)
class Preemption:
    """A notice that machines of this job are about to be taken away."""

    nodes: tuple[str, ...]
    """Their names, as the launcher knows them, sorted."""
    ranks: tuple[int, ...]
    """The workers on them."""
    deadline: float | None = None
    """When the first of them goes, in seconds since 1970; None if nobody said."""


class Context:
    """The loop's only view of who runs it. By itself it is that of a lone process, which nobody stops or takes away and
    which has no dashboard."""

    rank: int = 0
    world_size: int = 1
    device: torch.device
    #: Names this start of the job in files; the same for every rank and every restart by the launcher.
    launch_id: str
    #: Whether a worker may be ended inside ``report``: all that belongs to an evaluation is committed before it then.
    reports_are_final: bool = False
    #: The stages of this start of the job.
    times: StartTimes

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Hand metrics to the launcher's own dashboard. Called by all ranks after an evaluation; may be slow."""

    def observe(self, run_dir: str, values: Mapping[str, float]) -> None:
        """Show figures of a run while it trains, by their names in metrics.jsonl. Called by rank 0; must be quick."""

    def stop_requested(self) -> bool:
        """Return whether the job was asked to save and end (SIGTERM). Asked often; one rank's yes is enough."""
        return False

    def preemption(self) -> Preemption | None:
        """Return the machines that are about to be taken away, or None. All ranks call it together and get equal
        answers; may be slow."""
        return None


def stay_here() -> None:
    """Have workers that are all on this machine talk by its loopback, unless the user has named an interface. Call it
    before they form a process group."""
    if sys.platform == "linux":
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_distributed() -> bool:
    """Return whether there are several ranks. One rank needs no collective, though Ray and torchrun form a group for it
    too: a CUDA graph of its steps then holds none."""
    return world_size() > 1


def all_sum(tensor: Tensor) -> Tensor:
    """Sum of ``tensor`` over all ranks, in place; the tensor itself for one rank."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def from_first(tensor: Tensor) -> None:
    """Give every rank the first one's ``tensor``, in place."""
    if is_distributed():
        dist.broadcast(tensor, src=0)


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


def ask_first(look: Callable[[], T]) -> T:
    """Return on every rank what ``look()`` returns on rank 0 (small, picklable), where alone it is called.

    Its UserError, DamagedDataError or StorageError is raised on every rank; after any other error rank 0 leaves the
    others waiting.
    """
    if not is_distributed():
        return look()
    answer: T | None = None
    error: UserError | DamagedDataError | StorageError | None = None
    if dist.get_rank() == 0:
        try:
            answer = look()
        except (UserError, DamagedDataError, StorageError) as raised:
            error = raised
    answer, error = share_from_first((answer, error))
    if error is not None:
        raise error
    return answer


_side_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _side_group() -> Any:
    """A gloo group over all ranks: small collectives of CPU tensors that do not wait for the GPU's queue."""
    if dist.get_backend() == "gloo":
        return None  # the default group is one
    from datetime import timedelta

    world = dist.group.WORLD
    if world not in _side_groups:
        _side_groups[world] = dist.new_group(backend="gloo", timeout=timedelta(seconds=GROUP_SECONDS))
    return _side_groups[world]


def all_max(values: list[int]) -> list[int]:
    """Each value's maximum over all ranks, by a side channel that does not wait for the GPU. About 0.1 ms."""
    if not is_distributed():
        return values
    box = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(box, op=dist.ReduceOp.MAX, group=_side_group())
    return box.tolist()


def first_said(said: str) -> str:
    """Return on every rank the text of the lowest rank that has one; "" where none has. By the side channel."""
    if not is_distributed():
        return said
    every = [""] * dist.get_world_size()
    dist.all_gather_object(every, said, group=_side_group())
    return next((one for one in every if one), "")


def gather_by_rank(tensor: Tensor) -> list[Tensor]:
    """Every rank's CPU ``tensor`` (of equal shape), in the order of ranks, on every rank."""
    if not is_distributed():
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous(), group=_side_group())
    return parts


def gather_lanes(mine_KX: Tensor, lanes: int) -> Tensor:
    """All lanes' tensors (lanes, ...), in the order of lanes, from each rank's own (its lanes, ...).

    Lanes are dealt round-robin, so that some ranks may carry one lane less: those are padded for the way. Tensors
    stay on their device. Time and memory grow with lanes, whatever the number of workers.
    """
    if not is_distributed():
        return mine_KX
    world = dist.get_world_size()
    most = -(-lanes // world)
    padded = mine_KX.new_zeros((most, *mine_KX.shape[1:]))
    padded[: len(mine_KX)] = mine_KX
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:lanes]  # (most, world) in memory order: lane = row * world + rank


def all_but(lane: int, value_LX: Tensor) -> Tensor:
    """Return what is of the other lanes. A list as an index would be copied to the device, which waits for it, and
    which a graph cannot hold."""
    return torch.cat([value_LX[:lane], value_LX[lane + 1 :]])
