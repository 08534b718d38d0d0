"""Facts about a node, and checks that compare nodes."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mimkd_ray.doctor.outcome import Outcome, Status
from mimkd_ray.errors import count, listed
from mimkd_ray.versions import versions

SHM = "/dev/shm"
SMALL_SHM_BYTES = 10**9
"""Size below which processes that exchange batches through shared memory run out of it. Containers have 64 MB by
default."""

CLOCK_WARN_S, CLOCK_FAIL_S = 1.0, 300.0
"""Limits for the differences between clocks. Object stores refuse requests that are signed 15 minutes off."""


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """Facts about one node."""

    node: str
    """Address of the node."""
    versions: Mapping[str, str]
    """Versions of Python and the packages that affect a result, and the digest of this package's source."""
    ray_gpus: int
    """GPUs that Ray assigns there."""
    torch_gpus: int
    """GPUs that torch sees there."""
    shm_bytes: int
    """Size of /dev/shm; 0 if there is none."""
    object_store_bytes: int
    """Largest size of Ray's object store in it."""
    auth_mode: str
    """RAY_AUTH_MODE of its Ray; empty if unset."""


def look(node: str, ray_gpus: int, object_store_bytes: int) -> NodeFacts:
    """Return the facts of the machine that this process runs on; the arguments come from Ray."""
    import torch

    shm = os.statvfs(SHM) if os.path.isdir(SHM) else None
    return NodeFacts(
        node=node,
        versions={**versions(), "mimkd_ray source": source_digest()},
        ray_gpus=ray_gpus,
        torch_gpus=torch.cuda.device_count(),
        shm_bytes=shm.f_blocks * shm.f_frsize if shm else 0,
        object_store_bytes=object_store_bytes,
        auth_mode=os.environ.get("RAY_AUTH_MODE", ""),
    )


def source_digest() -> str:
    """Return 12 digits of the sha256 of this package's files, which are equal if the code is, however it was
    installed."""
    root = Path(__file__).parents[1]
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return total.hexdigest()[:12]


def check_versions(facts: Sequence[NodeFacts]) -> Outcome:
    """Check that Python, this package and those that affect a result are installed on all nodes, in one version."""
    wrong = []
    for name in facts[0].versions:
        nodes = defaultdict(list)
        for each in facts:
            nodes[each.versions.get(name, "not installed")].append(each.node)
        if len(nodes) > 1 or "not installed" in nodes:
            wrong.append(f"{name} {', '.join(f'{version} on {listed(on)}' for version, on in nodes.items())}")
    if wrong:
        remedy = "start all nodes from one image, with `pip install -c constraints.txt .` (cluster/Dockerfile)"
        return Outcome(check="versions", status="fail", text="; ".join(wrong), remedy=remedy)
    same = ", ".join(f"{name} {version}" for name, version in facts[0].versions.items())
    return Outcome(check="versions", status="pass", text=f"{_nodes(facts)}: {same}")


def check_gpus(facts: Sequence[NodeFacts]) -> Outcome:
    """Check that torch sees the GPUs that Ray assigns."""
    wrong = [each for each in facts if each.ray_gpus != each.torch_gpus]
    figures: dict[str, float] = {
        "ray_gpus": sum(each.ray_gpus for each in facts),
        "torch_gpus": sum(each.torch_gpus for each in facts),
    }
    if wrong:
        text = ", ".join(f"Ray has {each.ray_gpus} and torch {each.torch_gpus} on {each.node}" for each in wrong)
        remedy = (
            "install a torch build for the node's driver (nvidia-smi shows it), give the container its GPUs, "
            "and start Ray without --num-gpus or with the true number"
        )
        return Outcome(check="gpus", status="fail", text=text, remedy=remedy, figures=figures)
    if not figures["ray_gpus"]:
        return Outcome(check="gpus", status="pass", text="none: training would run on CPUs", figures=figures)
    counts = ", ".join(f"{each.ray_gpus} on {each.node}" for each in facts if each.ray_gpus)
    return Outcome(check="gpus", status="pass", text=f"Ray and torch see the same: {counts}", figures=figures)


def check_authentication(facts: Sequence[NodeFacts]) -> Outcome:
    """Check that all nodes require a token, or none does."""
    modes = defaultdict(list)
    for each in facts:
        modes[each.auth_mode or "unset"].append(each.node)
    found = ", ".join(f"{mode} on {listed(nodes)}" for mode, nodes in modes.items())
    remedy = "set RAY_AUTH_MODE=token and one token for all nodes and clients (cluster/README.md)"
    if len(modes) > 1:
        return Outcome(check="authentication", status="fail", text=f"RAY_AUTH_MODE differs: {found}", remedy=remedy)
    if "token" not in modes:
        text = f"RAY_AUTH_MODE is {found}: whoever reaches the cluster's ports runs code on it"
        return Outcome(check="authentication", status="warn", text=text, remedy=remedy)
    return Outcome(check="authentication", status="pass", text=f"by token on {_nodes(facts)}")


def check_memory(facts: NodeFacts) -> Outcome:
    """Check that /dev/shm has room for Ray's object store and for the batches that processes exchange."""
    size, store = facts.shm_bytes, facts.object_store_bytes
    text = f"{SHM} has {size / 1e9:.1f} GB, Ray's object store may take {store / 1e9:.1f} GB"
    figures = {"shm_gb": size / 1e9, "object_store_gb": store / 1e9}
    remedy = "start the container with --shm-size, or mount an emptyDir of medium Memory at /dev/shm"
    if size < SMALL_SHM_BYTES:
        remedy = f"batches are handed over through it, and it would run full: {remedy}"
        return Outcome(check="memory", status="fail", text=text, node=facts.node, remedy=remedy, figures=figures)
    if size < store:
        remedy = f"the store would be on disk, and slow: {remedy}"
        return Outcome(check="memory", status="warn", text=text, node=facts.node, remedy=remedy, figures=figures)
    return Outcome(check="memory", status="pass", text=text, node=facts.node, figures=figures, speed=size)


def check_clock(node: str, difference_s: float, uncertain_s: float) -> Outcome:
    """Check that a node's clock agrees with this process's; `difference_s` is known to within `uncertain_s`."""
    text = f"{difference_s:+.3f} s from this process's clock (known to {uncertain_s:.3f} s)"
    figures = {"difference_s": difference_s, "uncertain_s": uncertain_s}
    beyond = max(0.0, abs(difference_s) - uncertain_s)
    if beyond > CLOCK_WARN_S:
        status: Status = "fail" if beyond > CLOCK_FAIL_S else "warn"
        remedy = (
            "run chrony or another time service there: object stores refuse requests that are signed off their time"
        )
        return Outcome(check="clock", status=status, text=text, node=node, remedy=remedy, figures=figures)
    return Outcome(check="clock", status="pass", text=text, node=node, figures=figures, speed=-beyond)


def _nodes(facts: Sequence[NodeFacts]) -> str:
    return count(len(facts), "node")
