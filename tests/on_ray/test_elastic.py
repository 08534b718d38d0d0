"""A restart after a lost node, before Ray has noticed the loss."""

from __future__ import annotations

import hashlib
import inspect
import logging
import socket
import sys
import time
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest

ray = pytest.importorskip("ray")

from jobs_here import ENVIRONMENT, ROOT, TAKES_LONG  # noqa: E402
from packaging.requirements import Requirement  # noqa: E402
from ray._private.state import state  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (  # noqa: E402
    _AutoscalingCoordinatorActor,
)
from ray.train import ScalingConfig  # noqa: E402
from ray.train.torch import TorchTrainer  # noqa: E402
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision  # noqa: E402
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy  # noqa: E402

from mimkd_ray.on_ray import nodes, train_workers  # noqa: E402
from mimkd_ray.on_ray.nodes import elastic  # noqa: E402
from mimkd_ray.on_ray.nodes.elastic import PromptPolicy  # noqa: E402

AS_READ = {
    "ElasticScalingPolicy.make_decision_for_non_running_worker_group": "e0a0292656e3abd2",
    "ElasticScalingPolicy.make_decision_for_running_worker_group": "9bc8c63cc4ad8a1a",
    "ElasticScalingPolicy._count_possible_workers": "9ea722d0fec7fb69",
    "ElasticScalingPolicy._get_reserved_resources": "5bcd17e7fc8512d6",
    "ScalingPolicy._autoscaling_coordinator": "f3e6972d32498721",
    "DataParallelTrainer.fit": "5d2b8d40bfcb2069",
    "DataParallelTrainer._initialize_and_run_controller": "ea57ec4498323973",
    "_AutoscalingCoordinatorActor.get_reserved_resources": "1cf6f63ce800ed88",
    "_AutoscalingCoordinatorActor._tick": "d451e322153d4fff",
    "GlobalState.get_draining_nodes": "06237c8c5fb3f1ad",
}
"""The first half of the SHA-256 of each function's source, in the Ray that on_ray/nodes/elastic.py was read in."""

RELIES_ON: tuple[tuple[object, tuple[str, ...]], ...] = (
    (
        ElasticScalingPolicy,
        (
            *("make_decision_for_non_running_worker_group", "make_decision_for_running_worker_group"),
            *("_count_possible_workers", "_get_reserved_resources", "_autoscaling_coordinator"),
        ),
    ),
    (TorchTrainer, ("fit", "_initialize_and_run_controller")),
    (_AutoscalingCoordinatorActor, ("get_reserved_resources", "_tick")),
    (state, ("get_draining_nodes",)),
)
"""Private parts of Ray that on_ray/nodes/elastic.py uses, replaces or calls."""

WORKERS = ScalingConfig(num_workers=(1, 2), resources_per_worker={"CPU": 1})


def test_what_was_read_in_ray_is_unchanged() -> None:
    """With a new Ray: read these functions again, mend or remove on_ray/nodes/elastic.py, note the new digests."""
    found = {}
    for owner, names in RELIES_ON:
        for name in names:
            member = inspect.getattr_static(owner if isinstance(owner, type) else type(owner), name)
            function = member.fget if isinstance(member, property) else member
            found[function.__qualname__] = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]
    assert found == AS_READ
    policy = vars(ElasticScalingPolicy(ScalingConfig(num_workers=(1, 2))))
    assert {"_requester_id", "_latest_reserved_resources_query_time"} <= {*policy}


def test_the_dependency_range_is_the_rays_that_it_was_read_in() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (needs,) = (each for each in map(Requirement, project["dependencies"]) if each.name == "ray")
    major, minor = map(int, elastic.READ_IN.rstrip(".").split("."))
    assert needs.specifier.contains(f"{major}.{minor}.0")
    assert needs.specifier.contains(f"{major}.{minor}.9")
    assert not needs.specifier.contains(f"{major}.{minor - 1}.9")
    assert not needs.specifier.contains(f"{major}.{minor + 1}.0")
    assert not needs.specifier.contains(f"{major + 1}.0.0")


def test_only_a_range_of_workers_gets_the_prompt_trainer(caplog: pytest.LogCaptureFixture) -> None:
    assert train_workers.trainer_class(True) is elastic.ElasticTrainer
    assert train_workers.trainer_class(False) is train_workers.TorchTrainer
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("version", "ray is 2.61.0, and mimkd_ray/on_ray/nodes/elastic.py was written for 2.60."),
        ("module", "ray.train.v2._internal.execution.scaling_policy.elastic"),
    ],
)
def test_with_another_ray_the_plain_trainer_is_used_and_one_line_says_so(
    change: str, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if change == "version":
        monkeypatch.setattr(ray, "__version__", "2.61.0")
    else:
        monkeypatch.setitem(sys.modules, ElasticScalingPolicy.__module__, None)
        monkeypatch.delitem(sys.modules, elastic.__name__)
        monkeypatch.delattr(nodes, "elastic")
    with caplog.at_level(logging.WARNING, train_workers.__name__):
        assert train_workers.trainer_class(True) is train_workers.TorchTrainer
    (said,) = (record.getMessage() for record in caplog.records)
    assert "after a lost node training goes on up to 40 s later" in said
    assert why in said
    assert "\n" not in said


class Started:
    """All that a policy reads of a run."""

    run_id = "test"


@pytest.fixture
def raylet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The raylet of the second of two nodes of one CPU; the head has the driver."""
    for name in ("RAY_AUTH_MODE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    options = {"object_store_memory": 100_000_000}
    made = Cluster(initialize_head=True, head_node_args={**options, "num_cpus": 1, "include_dashboard": False})
    try:
        last = made.add_node(**options, num_cpus=1)
        ray.init(address=made.address)
        yield last.all_processes["raylet"][0].process
    finally:
        ray.shutdown()
        made.shutdown()


def decide(policy: ElasticScalingPolicy, seconds: float) -> int:
    """Workers that it starts, asked as Ray Train asks it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        decision = policy.make_decision_for_non_running_worker_group()
        if isinstance(decision, ResizeDecision):
            return decision.num_workers
        assert isinstance(decision, NoopDecision)
        time.sleep(0.1)
    raise AssertionError(f"no decision in {seconds} s")


@TAKES_LONG
@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_was_just_killed_is_not_counted(raylet: Any) -> None:
    ours, rays = PromptPolicy(WORKERS), ElasticScalingPolicy(WORKERS)
    ours.after_controller_start(Started())
    assert decide(ours, 30) == 2
    raylet.kill()
    raylet.wait()
    rays._requester_id, rays._coordinator_client = ours._requester_id, ours._coordinator_client
    assert decide(rays, 5) == 2, "Ray's own policy counts it: PromptPolicy has nothing to mend any more"
    assert len(elastic.silent_nodes()) == 1
    assert decide(ours, 60) == 1
    assert elastic.silent_nodes() == []


class _Drained:
    """The state of a cluster in which nodes are being drained."""

    def __init__(self, *nodes: str) -> None:
        self._nodes = nodes

    def get_draining_nodes(self) -> dict[str, int]:
        return dict.fromkeys(self._nodes, 0)


def test_nothing_is_counted_on_nodes_that_are_being_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = {"a": {"CPU": 1.0}, "b": {"CPU": 1.0}}
    monkeypatch.setattr(elastic, "silent_nodes", list)
    monkeypatch.setattr(elastic, "state", _Drained("b"))
    monkeypatch.setattr(PromptPolicy, "_look", lambda _: None)
    monkeypatch.setattr(PromptPolicy, "_maybe_send_resource_request", lambda _: None)
    monkeypatch.setattr(PromptPolicy, "_get_reserved_resources", lambda _: reserved)
    policy = PromptPolicy(WORKERS)
    decision = policy.make_decision_for_non_running_worker_group()
    assert isinstance(decision, ResizeDecision)
    assert decision.num_workers == 1
    assert policy._count_possible_workers(reserved) == 2, "workers that run are left alone"


class _Ray:
    """A cluster of addresses."""

    def __init__(self, *nodes: tuple[int, bool]) -> None:
        self._nodes = [{"Alive": a, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": p} for p, a in nodes]

    def nodes(self) -> list[dict[str, Any]]:
        return self._nodes


def test_silent_nodes_are_those_alive_for_ray_that_take_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as there, socket.create_server(("127.0.0.1", 0)) as gone:
        port, closed = there.getsockname()[1], gone.getsockname()[1]
        gone.close()
        monkeypatch.setattr(elastic, "ray", _Ray((port, True), (closed, True), (closed, False)))
        assert elastic.silent_nodes() == ["127.0.0.1"]
        monkeypatch.setattr(elastic, "ray", _Ray((port, True), (closed, False)))
        assert elastic.silent_nodes() == []


def test_nodes_that_stay_silent_are_waited_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(elastic, "silent_nodes", lambda: ["10.0.0.7"])
    monkeypatch.setattr(elastic.time, "monotonic", lambda: now)
    policy = PromptPolicy(WORKERS)
    monkeypatch.setattr(ElasticScalingPolicy, "make_decision_for_non_running_worker_group", lambda _: "as Ray does")
    monkeypatch.setattr(PromptPolicy, "_look", lambda _: None)
    monkeypatch.setattr(elastic, "state", _Drained())
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)
    now += elastic.SILENT_SECONDS - 1
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)
    now += 1
    assert policy.make_decision_for_non_running_worker_group() == "as Ray does"


def test_the_cluster_is_looked_at_once_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = 100.0, []
    monkeypatch.setattr(elastic, "silent_nodes", lambda: looks.append(now) or ["10.0.0.7"])
    monkeypatch.setattr(elastic.time, "monotonic", lambda: now)
    policy = PromptPolicy(WORKERS)
    for step in (0.0, 0.4, 0.4, 0.4, 0.4):
        now += step
        assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)
    assert looks == pytest.approx([100.0, 101.2])
