"""A search on digits whose trials take a second, for tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tiny_run import tiny_config
from torch import nn

from mimkd_ray.config import Config, SearchConfig, SearchJob
from mimkd_ray.config.jobs.search import search_job
from mimkd_ray.models.build_model import build_model
from mimkd_ray.search.configs import TrialConfigs, trial_config
from mimkd_ray.search.spaces import find_spaces
from mimkd_ray.search.suggest import Candidates, Suggest


def tiny_job(folder: Path | str, sections: dict[str, dict[str, Any]] | None = None, **search: Any) -> SearchJob:
    """Trials of two epochs; ``search`` overrides the search's fields, ``sections`` those of the recipe."""
    own: dict[str, dict[str, Any]] = {"run": {"root": str(folder)}}
    for name, fields in (sections or {}).items():
        own[name] = own.get(name, {}) | fields
    config = SearchConfig(**({"space": ("temperature",), "trials": 3, "holdout": 0.3, "finalists": 0} | search))
    return search_job(tiny_config(**own), search=config)


def tiny_configs(folder: Path, *names: str, **search: Any) -> TrialConfigs:
    """The configs of its trials; spaces by ``names``."""
    job = tiny_job(folder, space=names or ("temperature",), **search)
    return TrialConfigs(trial_config(job, job.search), find_spaces(job.search.space))


def figures(epoch: int, top1: float, nats: float = 1.0) -> dict[str, Any]:
    """Return the figures of an evaluation."""
    return {"epoch": epoch, "step": 3 * epoch, "top1": top1, "top5": 90.0, "cross_entropy": 1.0, "a/nats": nats}


def width(trial: Suggest, config: Config, pairs: Candidates) -> Config:
    """A space of a test's own."""
    own = trial.suggest_categorical("width", (8, 16))
    return replace(config, loss=replace(config.loss, critic=replace(config.loss.critic, width=own)))


def giant(num_classes: int) -> nn.Module:
    """A network of four terabytes."""
    model = build_model("cifar/resnet8_w4", num_classes)
    model.giant = nn.Linear(10**6, 10**6)
    return model


def wild(config: Config) -> Config:
    """A config whose weights grow a million times at every step."""
    return replace(config, optim=replace(config.optim, lr=1000.0, weight_decay=1000.0))


def unlucky(trial: Suggest, config: Config, pairs: Candidates) -> Config:
    """Some trials cannot be trained: one asks for more memory than there is, one has a loss that explodes."""
    fate = trial.suggest_categorical("fate", ("fine", "huge", "wild"))
    if fate == "huge":
        return replace(config, student=replace(config.student, name="tiny_search:giant"))
    if fate == "wild":
        return wild(config)
    return config


def slow_second(trial: Suggest, config: Config, pairs: Candidates) -> Config:
    """Three trials of a grid, of which the second learns nothing."""
    return replace(config, optim=replace(config.optim, lr=trial.suggest_categorical("lr", (0.05, 1e-9, 0.02))))


def steady(trial: Suggest, config: Config, pairs: Candidates) -> Config:
    """A number that a population moves."""
    return replace(config, optim=replace(config.optim, lr=trial.suggest_float("lr", 1e-3, 0.1, log=True)))


def own_searcher(search: SearchConfig) -> Any:
    """A searcher of a user's own."""
    from ray.tune.search.basic_variant import BasicVariantGenerator

    return BasicVariantGenerator(max_concurrent=search.trials)


def no_searcher(search: SearchConfig) -> Any:
    """A function that forgets to return it."""


def odd(trial: Suggest, config: Config, pairs: Candidates) -> Config:
    """Another space of a user's own."""
    return replace(config, loss=replace(config.loss, kd_weight=trial.suggest_float("kd_weight", 0.1, 1.0)))
