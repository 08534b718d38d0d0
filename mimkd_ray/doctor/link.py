"""Speed at which nodes sum a tensor: the collective on which every training step waits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from mimkd_ray.doctor.outcome import Outcome, redacted

MEGABYTES = 64
"""Size of the tensor: the gradients of a ResNet-34 are 87 MB."""

ROUNDS, WARM_ROUNDS = 3, 1
SECONDS = 60
"""Seconds after which a rank that waits for the others gives up."""

SLOW_GB_S = 0.125
"""Speed below which the check warns, 1 Gbit/s: a ResNet-18's gradients (47 MB) would take 0.7 s a step."""

Backend = Literal["gloo", "nccl"]


@dataclass(frozen=True, kw_only=True)
class LinkSpeed:
    """Time that a rank measured; ``error`` is empty on success."""

    seconds: float = 0.0
    error: str = ""


def open_store(host: str) -> tuple[TCPStore, int]:
    """Open the ranks' meeting point; return it and its port, which the system chooses. The first rank keeps it until
    the end."""
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=SECONDS))
    return store, store.port


def join_store(host: str, port: int) -> TCPStore:
    """Connect to the meeting point from another rank. Raises RuntimeError if it does not answer."""
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=SECONDS))


def measure(store: Store, rank: int, world: int, backend: Backend) -> LinkSpeed:
    """Return this rank's best time of an all-reduce of 64 MB over all ranks. Each rank calls it in a separate process
    without a process group. Takes at most a few minutes, even if other ranks fail."""
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS))
        try:
            seconds = [_round(device, world) for _ in range(WARM_ROUNDS + ROUNDS)]
        finally:
            dist.destroy_process_group()
    except (RuntimeError, ValueError) as error:  # dist.DistError is a RuntimeError
        first = str(error).splitlines()[0] if str(error) else "no message"
        return LinkSpeed(error=redacted(f"{type(error).__name__}: {first}"))
    return LinkSpeed(seconds=min(seconds[WARM_ROUNDS:]))


def _round(device: torch.device, world: int) -> float:
    tensor = torch.ones(MEGABYTES * 250_000, device=device)
    _settle(device)
    began = time.perf_counter()
    dist.all_reduce(tensor)
    _settle(device)
    seconds = time.perf_counter() - began
    if not bool((tensor == world).all()):
        raise RuntimeError(f"the sum of {world} tensors of ones is not {world}")
    return seconds


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_all_reduce(speeds: Sequence[LinkSpeed], backend: Backend, where: str) -> Outcome:
    """Judge the times that the ranks measured. ``where``: "4 nodes", or "2 processes of one node"."""
    failed = {rank: speed.error for rank, speed in enumerate(speeds) if speed.error}
    if failed:
        rank, error = next(iter(failed.items()))
        return Outcome(
            check="all-reduce",
            status="fail",
            text=f"{backend} over {where}: {len(failed)} of {len(speeds)} ranks failed; rank {rank}: {error}",
            remedy=(
                "open all ports between the nodes, and name the network interface that they share "
                f"({'NCCL' if backend == 'nccl' else 'GLOO'}_SOCKET_IFNAME=eth0) in the environment of Ray"
            ),
        )
    seconds, world = max(speed.seconds for speed in speeds), len(speeds)
    # Bus bandwidth: every rank sends and receives 2 (world - 1) / world times the tensor, whatever the number of ranks.
    rate = MEGABYTES / 1e3 * 2 * (world - 1) / world / seconds
    slow = rate < SLOW_GB_S
    return Outcome(
        check="all-reduce",
        status="warn" if slow else "pass",
        text=f"{backend} over {where}: {MEGABYTES} MB in {1000 * seconds:.0f} ms, {rate:.2f} GB/s a link",
        remedy=(
            "training would wait for gradients: take nodes with more bandwidth, in one zone or placement group"
            if slow
            else ""
        ),
        figures={"gb_s": rate, "ms": 1000 * seconds, "ranks": float(world)},
    )


def not_measured(why: str) -> Outcome:
    """Return the outcome if there are no two ranks to measure between; ``why`` is the reason."""
    return Outcome(check="all-reduce", status="pass", text=f"not measured: {why}")
