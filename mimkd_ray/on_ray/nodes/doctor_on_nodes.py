"""The checks of mimkd_ray/doctor on every node of a Ray cluster, with a time limit on every wait."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mimkd_ray import storage
from mimkd_ray.doctor import link, node_facts, storage_checks
from mimkd_ray.doctor.outcome import Outcome, redacted
from mimkd_ray.on_ray.nodes.cluster import connect
from mimkd_ray.secret_urls import Carried
from mimkd_ray.train.distributed import stay_here

if TYPE_CHECKING:
    from mimkd_ray.config import DoctorConfig

SEES_ALL_GPUS = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
"""Runtime environment that shows all GPUs: Ray hides them from processes that have not reserved them."""

CLOCK_TRIES = 5


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node in Ray's list."""

    ray_id: str
    name: str
    """Address of the node; if several nodes share one, as in tests, with the beginning of Ray's node id."""
    cpus: int
    gpus: int
    object_store_bytes: int


class Examiner:
    """The process on a node that does the checks, an actor without reservations."""

    def __init__(self, _secrets: Carried) -> None:
        pass

    def do(self, check: Callable[[], Any]) -> Any:
        """Return what a check finds here."""
        return check()


class Rank:
    """A rank of the all-reduce, as an actor in a separate process."""

    def open_store(self) -> tuple[str, int]:
        """Open the ranks' meeting point here; return its host and port."""
        host = ray.util.get_node_ip_address()
        self.store, port = link.open_store(host)
        return host, port

    def measure(
        self, host: str, port: int, rank: int, world: int, backend: link.Backend, one_node: bool
    ) -> link.LinkSpeed:
        """Call link.measure. ``one_node``: all ranks are on it, and talk by its loopback."""
        if one_node:
            stay_here()
        try:
            store = self.store if rank == 0 else link.join_store(host, port)
        except RuntimeError as error:
            return link.LinkSpeed(error=f"{host}:{port} does not answer: {str(error).splitlines()[0]}")
        return link.measure(store, rank, world, backend)


def cluster(config: DoctorConfig) -> list[Outcome]:
    """Check the cluster that the config names, or a Ray started by this process. Raises UserError if no cluster
    answers."""
    own = connect(config.address, "--address", ignore_reinit_error=True, log_to_driver=False)
    try:
        return _Visit(config, _nodes()).outcomes()
    finally:
        if own:
            ray.shutdown()


def _nodes() -> list[Node]:
    """Return the nodes that are alive."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    addresses = [node["NodeManagerAddress"] for node in alive]
    return [
        Node(
            ray_id=node["NodeID"],
            name=address if addresses.count(address) == 1 else f"{address} {node['NodeID'][:6]}",
            cpus=int(node["Resources"].get("CPU", 0)),
            gpus=int(node["Resources"].get("GPU", 0)),
            object_store_bytes=int(node["Resources"].get("object_store_memory", 0)),
        )
        for node, address in zip(alive, addresses, strict=True)
    ]


class _Visit:
    """One examiner on each node, and their answers. A node that does not answer is left out of later checks."""

    def __init__(self, config: DoctorConfig, nodes: Sequence[Node]) -> None:
        self.config = config
        self.silent: list[Outcome] = []
        kind = ray.remote(num_cpus=0, max_restarts=0)(Examiner)
        self.examiners = {
            node: kind.options(scheduling_strategy=_on(node), runtime_env=SEES_ALL_GPUS).remote(Carried())
            for node in nodes
        }

    def outcomes(self) -> list[Outcome]:
        """Return all checks, in the order in which they are shown."""
        config = self.config
        known = self._ask("nodes", lambda node: partial(node_facts.look, node.name, node.gpus, node.object_store_bytes))
        if not known:
            return self.silent
        everybody = list(known.values())
        found = [
            node_facts.check_versions(everybody),
            node_facts.check_gpus(everybody),
            node_facts.check_authentication(everybody),
        ]
        found += self._clocks()
        found += [node_facts.check_memory(each) for each in everybody]
        disk, decode = storage_checks.check_disk, storage_checks.check_decode
        found += self._ask("disk", lambda node: partial(disk, node.name, config.store, config.store_gb)).values()
        found += self._ask("decode", lambda node: partial(decode, node.name, node.cpus)).values()
        for root in config.root:
            found += self._storage(root)
        found.append(self._all_reduce())
        return [*found, *self.silent]

    def _ask(self, check: str, on: Callable[[Node], Callable[[], Any]]) -> dict[Node, Any]:
        """Do a check on all nodes at the same time. Those that do not answer in time are reported and not asked
        again."""
        asked = {node: examiner.do.remote(on(node)) for node, examiner in self.examiners.items()}
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=self.config.wait_seconds)
        answers = {}
        for node, answer in asked.items():
            try:
                answers[node] = ray.get(answer, timeout=0)
            except RayError as error:  # a timeout is one of them
                self._lost(check, node, error)
        return answers

    def _clocks(self) -> list[Outcome]:
        """Compare each node's clock with this process's, and bound the error, by the quickest of a few answers."""
        found = []
        for node, examiner in list(self.examiners.items()):
            best = (0.0, float("inf"))
            try:
                for _ in range(CLOCK_TRIES):
                    asked = time.time()
                    there = ray.get(examiner.do.remote(time.time), timeout=self.config.wait_seconds)
                    half = (time.time() - asked) / 2
                    if half < best[1]:
                        best = (there - asked - half, half)
            except RayError as error:
                self._lost("clock", node, error)
                continue
            found.append(node_facts.check_clock(node.name, *best))
        return found

    def _lost(self, check: str, node: Node, error: RayError, about: str = "") -> None:
        """Report a node that did not answer in time or whose process died."""
        del self.examiners[node]
        text = redacted(f"{about + ': ' if about else ''}{self._why(error)}")
        remedy = "look at the node's logs in Ray's dashboard; a longer --wait-seconds, if it is only slow"
        self.silent.append(Outcome(check=check, status="fail", node=node.name, text=text, remedy=remedy))

    def _why(self, error: RayError) -> str:
        lines = str(error).strip().splitlines()
        what = lines[-1] if isinstance(error, RayTaskError) else lines[0]  # that of a task ends in its error
        if isinstance(error, TimeoutError):
            what = f"no answer in {self.config.wait_seconds:g} s"
        return f"{what} ({type(error).__name__})"

    def _storage(self, root: str) -> list[Outcome]:
        """Check storage: the first node leaves a mark that all others must see; then each node reads and writes."""
        folder = storage.join(root, f"doctor-{uuid.uuid4().hex}")
        if not self.examiners:
            return []
        node, first = next(iter(self.examiners.items()))
        try:
            error = ray.get(
                first.do.remote(partial(storage_checks.leave_mark, folder)), timeout=self.config.wait_seconds
            )
        except RayError as lost:
            self._lost("storage", node, lost, root)
            return []
        if error:
            remedy = (
                "check the place, the endpoint, the credentials of this node, and that its policy allows the prefix"
            )
            return [Outcome(check="storage", status="fail", node=node.name, text=error, remedy=remedy)]
        found = self._ask("storage", lambda node: partial(storage_checks.check_storage, node.name, root, folder))
        if node in self.examiners:
            with suppress(RayError):  # failures have been reported already
                ray.get(first.do.remote(partial(storage.remove_tree, folder)), timeout=self.config.wait_seconds)
        return list(found.values())

    def _all_reduce(self) -> Outcome:
        """Run one rank per node, or as many as requested, spread over the nodes."""
        nodes = list(self.examiners)
        world = max(self.config.workers, len(nodes))
        if world < 2:
            return link.not_measured("one node and fewer than two workers (--workers 2 measures between processes)")
        backend: link.Backend = "nccl" if all(node.gpus >= -(-world // len(nodes)) for node in nodes) else "gloo"
        where = f"{len(nodes)} nodes" if len(nodes) > 1 else "processes of one node"
        kind = ray.remote(num_cpus=0, num_gpus=1 if backend == "nccl" else 0)(Rank)
        ranks = [kind.options(scheduling_strategy=_on(nodes[rank % len(nodes)])).remote() for rank in range(world)]
        try:
            host, port = ray.get(ranks[0].open_store.remote(), timeout=self.config.wait_seconds)
            one_node = len(nodes) == 1
            answers = [
                rank.measure.remote(host, port, number, world, backend, one_node) for number, rank in enumerate(ranks)
            ]
            return link.check_all_reduce(ray.get(answers, timeout=self.config.wait_seconds), backend, where)
        except RayError as error:
            text = redacted(f"{backend} over {where}: {self._why(error)}")
            remedy = "are the GPUs taken by another job? else open all ports between the nodes"
            return Outcome(check="all-reduce", status="fail", text=text, remedy=remedy)
        finally:
            for rank in ranks:
                ray.kill(rank)


def _on(node: Node) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node.ray_id, soft=False)
