"""A Ray that lives and dies with this process, and a trainer that leaves out what such a Ray has no use for.

Ray Train starts a handful of helper actors next to the workers, each of which imports Ray again: seconds on a small
machine. None of them has work to do in a cluster of one node that cannot grow, is never drained, and feeds no Ray Data.
On a real cluster the plain TorchTrainer runs with all of them.

This reaches below Ray's public surface, in places that were read in Ray 2.60; `run_ray` uses the
plain trainer with any other, which works as well and starts later.
"""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal import constants
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

SPARED_CALLBACKS = ("PlacementGroupCleanerCallback", "DatasetsCallback")
"""Free the placement groups of a killed controller; hand out Ray Data shards."""


class _FixedSize(FixedScalingPolicy):
    """Asks no autoscaler for the workers: the request goes through an actor of its own."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Nothing to register."""

    def _maybe_send_resource_request(self) -> None:
        """Nothing to renew."""


class _Controller(TrainController):
    """Gives workers no environment variables, which they inherit anyway: an actor with variables of its own waits for
    Ray's environment agent to start, and cannot take one of the processes that Ray has started in advance."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        for name in constants.ENV_VARS_TO_PROPAGATE:
            os.environ.pop(name, None)


class EmbeddedTrainer(TorchTrainer):
    """A TorchTrainer for a Ray that ends with this process."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if type(callback).__name__ not in SPARED_CALLBACKS]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        parts["scaling_policy"] = _FixedSize(self.scaling_config)
        controller = ray.remote(num_cpus=0)(_Controller).remote(**parts)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())
