"""Trackers that show a search live, if they are installed: MLflow, and Weights & Biases, by Ray's callbacks.

For Tune, the config of a trial is the start argument of its process: the whole configs of all its students. A tracker
gets their hyperparameters instead, by which trials are compared (and MLflow rejects parameters of over 6,000
characters).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mimkd_ray.errors import UserError


def trackers(names: Sequence[str], project: str) -> list[Any]:
    """Return Tune's callbacks for trackers by name: mlflow, wandb. Raises UserError if a package is not installed."""
    found: list[Any] = []
    for name in names:
        try:
            if name == "mlflow":
                import mlflow  # noqa: F401
                from ray.air.integrations.mlflow import MLflowLoggerCallback

                found.append(showing_hyperparameters(MLflowLoggerCallback)(experiment_name=project))
            else:
                import wandb  # noqa: F401
                from ray.air.integrations.wandb import WandbLoggerCallback

                found.append(showing_hyperparameters(WandbLoggerCallback)(project=project))
        except ImportError as error:
            raise UserError(f"--search.loggers {name}: {error}; install {name} on the driver") from None
    return found


def showing_hyperparameters(callback: type[Any]) -> type[Any]:
    """Return a subclass of Ray's logger callback that gets hyperparameters as a trial's config, and figures without
    it."""

    class Showing(callback):
        def log_trial_start(self, trial: Any) -> None:
            starts_with = trial.config
            trial.config = hyperparameters(starts_with["planned"])
            try:
                super().log_trial_start(trial)
            finally:
                trial.config = starts_with

        def log_trial_result(self, iteration: int, trial: Any, result: Mapping[str, Any]) -> None:
            super().log_trial_result(iteration, trial, figures(result))

    return Showing


def hyperparameters(planned: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the hyperparameters of a trial, by name; of a pack's trials, by number and name."""
    return _named({each["number"]: each["params"] for each in planned})


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of an evaluation that Tune reports, without configs: by name, or for a pack's trials by number
    and name."""
    plain = {name: value for name, value in result.items() if name not in ("config", "figures", "ended")}
    return plain | _named(json.loads(result.get("figures", "{}")))


def _named(by_number: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    if len(by_number) == 1:
        return dict(*by_number.values())
    return {f"{number}/{name}": value for number, values in by_number.items() for name, value in values.items()}
