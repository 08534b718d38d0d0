"""Ray Tune from Python: `mimkd_ray.search` and `mimkd_ray.trainable`. Ray is imported when they are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mimkd_ray import storage
from mimkd_ray.cli.training import absolute
from mimkd_ray.config import Config
from mimkd_ray.on_ray.nodes import environment
from mimkd_ray.search.suggest import Space


def search(
    config: Config,
    space: str | Space | Sequence[str | Space] | dict[str, Any] = ("temperature", "taps", "weights"),
    *,
    tune_config: Any = None,
    run_config: Any = None,
    resources: dict[str, float] | None = None,
    holdout: float = 0.1,
) -> Any:
    """Search with Ray Tune, in the connected Ray or one that starts here, and return its `ray.tune.ResultGrid`.

    ``space``: names of mimkd_ray/search/spaces.py and functions, which Optuna is asked by unless ``tune_config`` (a
    `ray.tune.TuneConfig`) has another searcher; or a Tune space over config fields, such as {"loss.kd_weight":
    tune.loguniform(0.1, 3)}, drawn from at random unless ``tune_config`` has a searcher. Without ``tune_config``: 24
    trials under ASHA; without a metric in it: top1. ``run_config`` is a `ray.tune.RunConfig`. Trials are scored (top1,
    top5, cross_entropy; knn without labels) on ``holdout`` of the training set, never on the validation set. Their
    checkpoints are run directories: best.safetensors is the student. A trial that fails by itself has the worst result,
    and "failed" and "reason" in its metrics; with `FailureConfig(fail_fast=True)` it ends the search instead.
    ``resources`` are those of a trial: {"CPU": 1} unless there are GPUs, then a GPU with its share of the CPUs.
    """
    storage.be_patient(config.storage.patience_minutes)
    environment.prepare(config.launch.address)
    from mimkd_ray.on_ray.search import tune_search

    return tune_search.search(
        absolute(config),
        space,
        tune_config=tune_config,
        run_config=run_config,
        resources=resources,
        holdout=holdout,
    )


def trainable(
    config: Config, space: str | Space | Sequence[str | Space] = (), *, holdout: float = 0.1, folder: str = ""
) -> Callable[[dict[str, Any]], None]:
    """Return a trainable for a `ray.tune.Tuner` of your own: it distils, and reports every evaluation.

    Its hyperparameters are fields of the config by their dotted names ("loss.kd_weight", "optim.lr"), flat or nested;
    or with ``space`` (names of mimkd_ray/search/spaces.py, or functions) what these spaces ask for. Reports epoch,
    step, top1, top5, cross_entropy (on ``holdout`` of the training set unless ``data.holdout`` is set) and the nats of
    each term, with a checkpoint: the run directory. ``folder`` (a path or URL that all nodes see) keeps the measured
    teacher for all trials. A trial that fails raises.
    """
    environment.prepare(config.launch.address)
    from mimkd_ray.on_ray.search import tune_trials

    return tune_trials.trainable(absolute(config), space, holdout=holdout, folder=folder)
