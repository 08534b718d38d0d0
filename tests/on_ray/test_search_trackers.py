"""The data of a trial that trackers get, with a callback of Ray's form that records it."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace
from typing import Any

import pytest

from mimkd_ray.errors import UserError
from mimkd_ray.on_ray.search_trackers import figures, hyperparameters, showing_hyperparameters, trackers


class _Remembering:
    def __init__(self, **options: Any) -> None:
        self.options = options
        self.started: list[Any] = []
        self.results: list[Any] = []

    def log_trial_start(self, trial: Any) -> None:
        self.started.append(dict(trial.config))
        if "fails" in trial.config:
            raise RuntimeError("no server")

    def log_trial_result(self, iteration: int, trial: Any, result: Any) -> None:
        self.results.append((iteration, dict(result)))


def _planned(number: int, **params: Any) -> dict[str, Any]:
    return {"number": number, "pack": number, "params": params, "config": {"recipe": "x" * 7000}}


def test_hyperparameters_of_one_trial_and_of_a_pack() -> None:
    assert hyperparameters([_planned(3, lr=0.1)]) == {"lr": 0.1}
    assert hyperparameters([_planned(3, lr=0.1), _planned(4, lr=0.2, on=True)]) == {
        "3/lr": 0.1,
        "4/lr": 0.2,
        "4/on": True,
    }


def test_a_tracker_sees_hyperparameters_and_figures_alone() -> None:
    callback = showing_hyperparameters(_Remembering)(project="p")
    config = {"planned": [_planned(0, lr=0.1)], "folder": "runs/x", "workers": 1}
    trial = SimpleNamespace(config=config)
    callback.log_trial_start(trial)
    told = {"0": {"top1": 9.0, "pool-pool/nats": 1.5}}
    callback.log_trial_result(2, trial, {"top1": 9.0, "pid": 7, "config": config, "figures": json.dumps(told)})
    callback.log_trial_result(3, trial, {"pid": 7, "ended": "{}"})
    assert callback.options == {"project": "p"}
    assert callback.started == [{"lr": 0.1}]
    assert callback.results == [(2, {"top1": 9.0, "pid": 7, "pool-pool/nats": 1.5}), (3, {"pid": 7})]
    assert trial.config is config, "Tune starts the trial with it"


def test_figures_of_a_pack_are_told_apart() -> None:
    told = {"3": {"top1": 9.0}, "4": {"top1": 8.0}}
    assert figures({"top1": 9.0, "figures": json.dumps(told)}) == {"top1": 9.0, "3/top1": 9.0, "4/top1": 8.0}


def test_the_trials_config_is_back_after_an_error() -> None:
    trial = SimpleNamespace(config={"planned": [_planned(0, fails=1)]})
    config = trial.config
    with pytest.raises(RuntimeError, match="no server"):
        showing_hyperparameters(_Remembering)().log_trial_start(trial)
    assert trial.config is config


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed(name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(UserError, match=f"--search.loggers {name}: .*; install {name} on the driver"):
        trackers([name], "p")
