"""A trainer that restarts soon after nodes are lost: the only file that uses private parts of Ray.

Ray Train learns of a lost worker before Ray's health checks declare its node dead, and restarts on the resources that
its AutoscalingCoordinator has reserved, which checks the cluster only every 20 s. Until then the lost node still
counts: the new worker group waits for it, up to RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S, and keeps all other nodes
waiting. Here nothing starts while a node does not answer, and the coordinator is made to check before a start. A node
that is being drained does not count either: Ray counts it until its end but places nothing on it.

Public settings alone do not keep a restart under 30 s. The health checks of nodes and workers and the start timeout
have environment variables (cluster/*.yaml set them), `ScalingConfig.elastic_resize_monitor_interval_s` applies to
running workers, and FailureConfig counts restarts. Nothing sets the coordinator's 20 s, which add to the 14 s that a
restart takes here, together with up to one start timeout.

This file can be removed once Ray's ElasticScalingPolicy makes the coordinator check (`recompute`) before a restart and
leaves out nodes that are being drained. It was written for Ray 2.60, to which pyproject.toml pins Ray; :func:`check`
raises for any other version, and `train_workers` then logs it and uses the plain trainer, which restarts later.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray._private.state import state
from ray.exceptions import RayError
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

logger = logging.getLogger(__name__)

READ_IN = "2.60."
"""Prefix of the Ray versions that this file was written for."""

LOOK_SECONDS = 1.0  # between two checks: Ray Train asks again at once after each "not yet"
ANSWER_SECONDS = 1.0  # for a node to accept a connection
COORDINATOR_SECONDS = 5.0  # for the coordinator to check the cluster and answer
SILENT_SECONDS = 20.0
"""Seconds to wait for nodes that do not answer. With the settings in cluster/, Ray declares them dead earlier."""


def check() -> None:
    """Raise ImportError if this file was not written for this Ray. tests/on_ray/test_elastic.py has what it uses."""
    if not ray.__version__.startswith(READ_IN):
        raise ImportError(f"ray is {ray.__version__}, and mimkd_ray/on_ray/nodes/elastic.py was written for {READ_IN}*")


class PromptPolicy(ElasticScalingPolicy):
    """Ray's elastic policy, which decides by the nodes that are there at the moment of the decision."""

    def __init__(self, scaling_config: ScalingConfig) -> None:
        super().__init__(scaling_config)
        self._looked = float("-inf")
        self._silent_since: float | None = None
        self._draining: frozenset[str] = frozenset()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Return the number of workers to start, or the decision to wait. Checks the cluster at most once a second."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return NoopDecision()
        self._looked = time.monotonic()
        silent = silent_nodes()
        if silent:
            self._silent_since = self._silent_since or time.monotonic()
            if time.monotonic() - self._silent_since < SILENT_SECONDS:
                return NoopDecision()
            logger.warning("starting although nodes do not answer: %s", ", ".join(silent))
        self._silent_since = None
        self._look()
        self._draining = frozenset(state.get_draining_nodes())
        try:
            return super().make_decision_for_non_running_worker_group()
        finally:
            self._draining = frozenset()  # running workers stay there until the end

    def _count_possible_workers(self, reserved_resources: Mapping[str, Any]) -> int:
        return super()._count_possible_workers(
            {node: has for node, has in reserved_resources.items() if node not in self._draining}
        )

    def _look(self) -> None:
        """Make the coordinator check the cluster now."""
        try:
            asked = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            ray.get(asked, timeout=COORDINATOR_SECONDS)
        except RayError as error:
            logger.warning("the coordinator's view of the cluster may be 20 s old: %r", error)
        self._latest_reserved_resources_query_time = float("-inf")  # what was read before the check is void


def silent_nodes() -> list[str]:
    """Return the addresses of nodes that Ray counts as alive but whose raylet accepts no connection: a second for 32
    such."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    with ThreadPoolExecutor(max_workers=32) as pool:
        answers = list(pool.map(_answers, nodes))
    return [node["NodeManagerAddress"] for node, answer in zip(nodes, answers, strict=True) if not answer]


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_SECONDS):
            return True
    except OSError:
        return False


class ElasticTrainer(TorchTrainer):
    """A TorchTrainer for a range of workers."""

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        parts["scaling_policy"] = PromptPolicy(self.scaling_config)
        return super()._initialize_and_run_controller(**parts)
