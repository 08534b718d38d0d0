"""The free capacity of a cluster's nodes for workers.

A worker runs on one node: one free CPU on each of two nodes is no place for a worker that takes two. Ray would wait for
ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from mimkd_ray.errors import count
from mimkd_ray.on_ray.nodes.resource_holders import Held


@dataclass(frozen=True)
class Capacity:
    """CPUs and GPUs of each node."""

    nodes: tuple[tuple[int, int], ...]

    @classmethod
    def of_cluster(cls, held: Sequence[Held] = ()) -> Capacity:
        """Return the capacity of the nodes of the connected Ray that are alive, less what is ``held``."""
        alive = [node for node in ray.nodes() if node["Alive"]]
        return cls(tuple((_left(node, "CPU", held), _left(node, "GPU", held)) for node in alive))

    @property
    def cpus(self) -> int:
        """Number of CPUs of all nodes."""
        return sum(cpus for cpus, _ in self.nodes)

    @property
    def gpus(self) -> int:
        """Number of GPUs of all nodes."""
        return sum(gpus for _, gpus in self.nodes)

    def room(self, cpus: float, gpu: float = 0) -> int:
        """Return the number of workers that fit if each takes ``cpus`` CPUs and ``gpu`` GPUs (or a share of one)."""
        return sum(
            min(_times(has, cpus), _on_gpus(gpus, gpu)) if gpu else _times(has, cpus) for has, gpus in self.nodes
        )

    def uses_gpu(self, wanted: str) -> bool:
        """Return whether workers have GPUs, by `launch.gpu`."""
        return wanted == "on" or (wanted == "auto" and self.gpus > 0)

    def lack(self, workers: int, what: str, cpus: float, gpu: float) -> str:
        """Return how it is too small for so many workers, the beginning of an error; "" if they fit."""
        if self.room(cpus, gpu) >= workers:
            return ""
        gpus = f" and {count(gpu, 'GPU')}" if gpu else ""
        return (
            f"{count(workers, what)} with {count(cpus, 'CPU')}{gpus} each do not fit: the cluster has "
            f"{count(self.cpus, 'CPU')} and {count(self.gpus, 'GPU')} on {count(len(self.nodes), 'node')}"
        )

    def most_cpus(self, workers: int) -> int:
        """Return the most CPUs that each of ``workers`` workers can have; 1 if they do not all fit."""
        largest = max((cpus for cpus, _ in self.nodes), default=0)
        for cpus in range(min(largest, self.cpus // max(workers, 1)), 1, -1):
            if self.room(cpus) >= workers:
                return cpus
        return 1

    def cpus_per_gpu(self) -> int:
        """Return the CPUs for each GPU on the node with the fewest; nodes without a GPU are ignored."""
        return max(1, min((cpus // gpus for cpus, gpus in self.nodes if gpus), default=1))


def _left(node: Mapping[str, Any], kind: str, held: Sequence[Held]) -> int:
    taken = sum(each.amounts.get(kind, 0.0) for each in held if each.node == node.get("NodeID"))
    return max(0, int(node["Resources"].get(kind, 0) - taken + 1e-9))


def _times(has: int, each: float) -> int:
    return int(has / each + 1e-9)


def _on_gpus(gpus: int, each: float) -> int:
    """Return the number of workers that fit on ``gpus`` GPUs; a share of a GPU is always of one GPU."""
    return gpus * _times(1, each) if each <= 1 else _times(gpus, each)
