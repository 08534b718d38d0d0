"""A trainer that goes on soon after nodes are lost.

Ray Train learns of a lost worker before Ray's health checks give up its node, and restarts on what its
AutoscalingCoordinator has reserved, which looks at the cluster only every 20 s. Until then the lost node counts as
there: the new worker group waits for it, up to RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S, and all other nodes with it.
Here nothing starts while a node does not answer, and the coordinator looks before it does. Nor is a node counted that
is being drained: Ray counts it as there until its end, and places nothing on it.

This reaches below Ray's public surface, in places that were read in Ray 2.60; with any other `ray_train` uses the plain
trainer, which goes on as well, later.
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
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2.api.config import ScalingConfig

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between two looks: Ray Train asks again at once after each "not yet"
ANSWER_SECONDS = 1.0  # for a node to take a connection
COORDINATOR_SECONDS = 5.0  # for the coordinator to look at the cluster and answer
SILENT_SECONDS = 20.0
"""How long nodes that do not answer are waited for. With the settings in cluster/, Ray gives them up earlier."""


class PromptPolicy(ElasticScalingPolicy):
    """Ray's elastic policy, which decides on the nodes that are there as it decides."""

    def __init__(self, scaling_config: ScalingConfig) -> None:
        super().__init__(scaling_config)
        self._looked = float("-inf")
        self._silent_since: float | None = None
        self._draining: frozenset[str] = frozenset()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """How many workers to start, or to wait. Looks at the cluster once a second at most."""
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
            self._draining = frozenset()  # workers that run stay there to the end

    def _count_possible_workers(self, reserved_resources: Mapping[str, Any]) -> int:
        return super()._count_possible_workers(
            {node: has for node, has in reserved_resources.items() if node not in self._draining}
        )

    def _look(self) -> None:
        """Have the coordinator look at the cluster now."""
        try:
            asked = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            ray.get(asked, timeout=COORDINATOR_SECONDS)
        except RayError as error:
            logger.warning("the coordinator's view of the cluster may be 20 s old: %r", error)
        self._latest_reserved_resources_query_time = float("-inf")  # what was heard before the look is void


def silent_nodes() -> list[str]:
    """Addresses of the nodes that Ray counts as alive and whose raylet takes no connection: a second for 32 such."""
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
