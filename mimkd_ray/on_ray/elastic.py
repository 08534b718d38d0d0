"""A trainer that goes on soon after nodes are lost: the only place that reaches below Ray's public surface.

Ray Train learns of a lost worker before Ray's health checks give up its node, and restarts on what its
AutoscalingCoordinator has reserved, which looks at the cluster only every 20 s. Until then the lost node counts as
there: the new worker group waits for it, up to RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S, and all other nodes with it.
Here nothing starts while a node does not answer, and the coordinator looks before it does. Nor is a node counted that
is being drained: Ray counts it as there until its end, and places nothing on it.

Public settings alone do not keep a restart under 30 s. The health checks of nodes and workers and the start timeout
have environment variables (cluster/*.yaml set them), `ScalingConfig.elastic_resize_monitor_interval_s` is for workers
that run, and FailureConfig counts restarts; nothing sets the coordinator's 20 s, which come on top of the 14 s that a
restart takes here, with up to one start timeout.

What it waits for upstream: that Ray's ElasticScalingPolicy asks the coordinator to look (`recompute`) before a restart
and leaves out nodes that are being drained. Then this file goes. It was read in Ray 2.60, to which pyproject.toml keeps
Ray; :func:`check` raises with any other, and `ray_train` logs it and uses the plain trainer, which goes on later.
"""

from __future__ import annotations

import inspect
import logging
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray._private.state import state
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import _AutoscalingCoordinatorActor
from ray.exceptions import RayError
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

logger = logging.getLogger(__name__)

READ_IN = "2.60."
"""The Ray versions that this file was written for begin so."""

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
"""Private parts that are used, replaced or called around here."""

LOOK_SECONDS = 1.0  # between two looks: Ray Train asks again at once after each "not yet"
ANSWER_SECONDS = 1.0  # for a node to take a connection
COORDINATOR_SECONDS = 5.0  # for the coordinator to look at the cluster and answer
SILENT_SECONDS = 20.0
"""How long nodes that do not answer are waited for. With the settings in cluster/, Ray gives them up earlier."""


def check() -> None:
    """Raise ImportError, which says why, if this Ray is not one that this file was written for."""
    if not ray.__version__.startswith(READ_IN):
        raise ImportError(f"ray is {ray.__version__}, and mimkd_ray/on_ray/elastic.py was written for {READ_IN}*")
    missing = [
        f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"
        for owner, names in RELIES_ON
        for name in names
        if not hasattr(owner, name)
    ]
    if (
        not missing
        and "recompute" not in inspect.signature(_AutoscalingCoordinatorActor.get_reserved_resources).parameters
    ):
        missing = ["_AutoscalingCoordinatorActor.get_reserved_resources(recompute=...)"]
    if not missing:
        policy = vars(ElasticScalingPolicy(ScalingConfig(num_workers=(1, 2))))
        missing = [
            f"ElasticScalingPolicy().{name}"
            for name in ("_requester_id", "_latest_reserved_resources_query_time")
            if name not in policy
        ]
    if missing:
        raise ImportError(f"ray {ray.__version__} has no {', '.join(missing)}, which mimkd_ray/on_ray/elastic.py uses")


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
