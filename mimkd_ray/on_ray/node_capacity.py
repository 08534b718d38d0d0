"""What the nodes of a cluster have room for.

A worker lives on one node: a CPU here and a CPU there are no place for one that takes two. Ray would wait for ever.
"""

from __future__ import annotations

from dataclasses import dataclass

import ray


@dataclass(frozen=True)
class Capacity:
    """CPUs and GPUs of each node."""

    nodes: tuple[tuple[int, int], ...]

    @classmethod
    def of_cluster(cls) -> Capacity:
        """Of the nodes of the connected Ray that are alive, in use or not."""
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return cls(tuple((int(has.get("CPU", 0)), int(has.get("GPU", 0))) for has in alive))

    @property
    def cpus(self) -> int:
        """CPUs in all."""
        return sum(cpus for cpus, _ in self.nodes)

    @property
    def gpus(self) -> int:
        """GPUs in all."""
        return sum(gpus for _, gpus in self.nodes)

    def room(self, cpus: float, gpu: float = 0) -> int:
        """How many workers fit that take so many CPUs and so much of a GPU (or so many GPUs) each."""
        return sum(
            min(_times(has, cpus), _on_gpus(gpus, gpu)) if gpu else _times(has, cpus) for has, gpus in self.nodes
        )

    def most_cpus(self, workers: int) -> int:
        """The most CPUs that each of so many workers can have; 1 where they do not all fit."""
        largest = max((cpus for cpus, _ in self.nodes), default=0)
        for cpus in range(min(largest, self.cpus // max(workers, 1)), 1, -1):
            if self.room(cpus) >= workers:
                return cpus
        return 1

    def cpus_per_gpu(self) -> int:
        """CPUs for each GPU, on the node that has the fewest; nodes without a GPU have no say."""
        return max(1, min((cpus // gpus for cpus, gpus in self.nodes if gpus), default=1))


def _times(has: int, each: float) -> int:
    return int(has / each + 1e-9)


def _on_gpus(gpus: int, each: float) -> int:
    """A share of a GPU is of one GPU."""
    return gpus * _times(1, each) if each <= 1 else _times(gpus, each)
