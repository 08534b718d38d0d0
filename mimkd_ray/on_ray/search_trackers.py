"""Other trackers that show a search live, where they are installed: MLflow, and Weights & Biases, by Ray's callbacks.

To Tune the config of a trial is what its process starts with: the whole configs of all its students. A tracker is shown
their hyperparameters instead, by which trials are compared (and MLflow takes no parameter of over 6,000 characters).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mimkd_ray.errors import UserError


def trackers(names: Sequence[str], project: str) -> list[Any]:
    """Tune's callbacks for trackers by name: mlflow, wandb. Raises UserError where a package is not installed."""
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
    """A kind of Ray's logger callback that is shown hyperparameters for a trial's config, and figures without it."""

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
    """Of a trial, by name; of a pack's trials, by number and name."""
    return _named({each["number"]: each["params"] for each in planned})


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """What Tune says of an evaluation, without configs and with all figures by name: of a pack's trials, by number and
    name."""
    plain = {name: value for name, value in result.items() if name not in ("config", "figures", "ended")}
    return plain | _named(json.loads(result.get("figures", "{}")))


def _named(by_number: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    if len(by_number) == 1:
        return dict(*by_number.values())
    return {f"{number}/{name}": value for number, values in by_number.items() for name, value in values.items()}
