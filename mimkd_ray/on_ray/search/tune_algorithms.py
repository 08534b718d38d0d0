"""Ray Tune's searchers, schedulers and loggers by the names of the command line."""

from __future__ import annotations

import importlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray import tune
from ray.tune import schedulers
from ray.tune.search import SearchAlgorithm, Searcher
from ray.tune.search.optuna import OptunaSearch

from mimkd_ray.config import SearchConfig
from mimkd_ray.config.form.json_form import dotted
from mimkd_ray.config.jobs.search import POPULATION
from mimkd_ray.errors import UserError
from mimkd_ray.search.configs import FieldConfigs, TrialConfigs
from mimkd_ray.search.optuna_study import sampler
from mimkd_ray.search.suggest import Grid, Options, Range
from mimkd_ray.search.trials import DIRECTIONS
from mimkd_ray.train.records.loggers import require_loggers
from mimkd_ray.user_functions import call_named, named_function

SCHEDULERS = {
    "asha": "async_hyperband",
    "hyperband": "hyperband",
    "median": "median_stopping_rule",
    "pbt": "pbt",
    "pb2": "pb2",
    "none": "fifo",
}
"""Ray Tune's names of the schedulers."""

DRAWS = 16
"""Draws of a space of Ray Tune of which one must make a config."""

LOGGERS = {
    "mlflow": ("ray.air.integrations.mlflow", "MLflowLoggerCallback", "experiment_name"),
    "wandb": ("ray.air.integrations.wandb", "WandbLoggerCallback", "project"),
    "comet": ("ray.air.integrations.comet", "CometLoggerCallback", "project_name"),
}
"""Module and name of Ray's callback, and what it calls the project."""


def metric_of(search: SearchConfig) -> dict[str, str]:
    """Return the metric and the mode, as Ray Tune takes them."""
    return {"metric": search.metric, "mode": _mode_of(search.metric)}


def with_metric(given: tune.TuneConfig) -> tune.TuneConfig:
    """Return the config with the metric, and the mode, that it leaves out, which are those of the command line. Raises
    UserError for a metric that no trial reports, and for a mode that looks for the worst."""
    parts = [getattr(part, "metric", None) for part in (given.scheduler, given.search_alg)]
    if given.metric is None and any(parts):
        return given
    metric = given.metric or SearchConfig().metric
    if metric not in (*DIRECTIONS, "top5") and "/" not in metric:  # "feature/PAIR/nats" depends on the taps
        raise UserError(
            f"the metric {metric!r} is not reported by trials: give {', '.join(DIRECTIONS)}, top5 or a term's nats"
        )
    mode = _mode_of(metric)
    if metric in DIRECTIONS and given.mode not in (None, mode):
        raise UserError(f"the metric is {metric} and the mode {given.mode}, which looks for the worst: give {mode}")
    return replace(given, metric=metric, mode=given.mode or mode)


def _mode_of(metric: str) -> str:
    return "min" if DIRECTIONS.get(metric) == "minimize" else "max"


def optuna_for(configs: TrialConfigs, given: tune.TuneConfig) -> OptunaSearch:
    """Return the searcher of spaces that know conditions. A scheduler that has the metric keeps it for itself."""
    metric = given.metric or given.scheduler.metric
    return OptunaSearch(configs.ask, metric=metric, mode=given.mode or _mode_of(metric))


def check_fields(configs: FieldConfigs, space: Mapping[str, Any]) -> None:
    """Raise UserError for a name in a space of Ray Tune that is no field, for a listed value that fits no draw of the
    others, and if no draw at all makes a config: such trials would fail, each after Ray and a worker have started."""
    flat = {name.removesuffix(".grid_search"): (name, value) for name, value in dotted(space)}
    # The choices of a whole section, {"optim": tune.choice([{...}, {...}])}, have their names below; those are tried.
    configs.check(name for name, (_, value) in flat.items() if not _has_sections(value))
    listed: dict[str, Sequence[Any]] = {}
    for name, (whole, value) in flat.items():
        listed[name] = value if name != whole else getattr(value, "categories", () if _is_drawn(value) else [value])
    if any(_is_drawn(value) and value.is_function() for _, value in flat.values()):
        return  # of the values of other hyperparameters, which Tune resolves

    def refusal(given: Mapping[str, Any]) -> UserError | None:
        for _ in range(DRAWS):
            drawn = {name: random.choice(own) if (own := listed[name]) else flat[name][1].sample() for name in flat}
            try:
                configs({**drawn, **given})
            except UserError as error:
                found = error
            else:
                return None
        return found

    given: Mapping[str, Any]
    for given in ({}, *({name: value} for name, values in listed.items() for value in values)):
        if error := refusal(given):
            which = "".join(f" {name} {value!r}" for name, value in given.items()) or " values of this space"
            raise UserError(f"no trial can have{which}: {error}")


def _has_sections(value: Any) -> bool:
    listed = value if isinstance(value, list) else getattr(value, "categories", ())
    return any(isinstance(each, Mapping) for each in listed)


def _is_drawn(value: Any) -> bool:
    return hasattr(value, "sample")


def scheduler_of(search: SearchConfig, configs: TrialConfigs | FieldConfigs) -> schedulers.TrialScheduler:
    """Return the scheduler. Time is counted in epochs."""
    name = "none" if search.pack > 1 else search.scheduler
    ranges: dict[str, Range] = {}
    if name in POPULATION:
        assert isinstance(configs, TrialConfigs)
        ranges = {name: value for name, value in configs.asked.items() if isinstance(value, Range)}
    return tune.create_scheduler(  # which leaves out what this one does not take
        "hb_bohb" if search.algorithm == "bohb" else SCHEDULERS[name],
        time_attr="epoch",
        max_t=configs.base.train.epochs,
        grace_period=min(search.grace, configs.base.train.epochs),
        reduction_factor=search.reduction,
        perturbation_interval=search.grace,
        hyperparam_bounds={name: [value.low, value.high] for name, value in ranges.items()},
        hyperparam_mutations={name: _domain(value) for name, value in ranges.items()},
    )


def searcher_of(
    search: SearchConfig, configs: TrialConfigs, grid: Grid | None = None
) -> tuple[Any, dict[str, Any] | None, int]:
    """Return the searcher (None: Ray's own draws), the flat space that it needs if it knows no conditions, and the
    number of samples. ``grid``: the combinations of one."""
    trials = len(grid) if grid else search.trials or -1
    if search.pack > 1:
        if trials < 0:
            return None, {"pack": tune.randint(0, 2**31)}, -1
        return None, {"pack": tune.grid_search(list(range(-(-trials // search.pack))))}, 1
    if search.scheduler in POPULATION:
        return None, tune_space(configs), trials
    if search.algorithm in ("tpe", "random", "grid"):
        found = OptunaSearch(configs.ask, sampler=sampler(search), points_to_evaluate=grid, **metric_of(search))
        return found, None, trials
    return _named(search), tune_space(configs), trials


def _named(search: SearchConfig) -> Any:
    """Return a searcher of Ray by its name, or one of the user's own."""
    if ":" in search.algorithm:
        own = named_function("search.algorithm", search.algorithm)
        found = call_named("search.algorithm", search.algorithm, own, search)
        if not isinstance(found, Searcher | SearchAlgorithm):
            raise UserError(
                f"search.algorithm {search.algorithm!r} returned {found!r:.80}: return a searcher of Ray Tune"
            )
        return found
    seed = search.seed % 2**32
    return tune.create_searcher(search.algorithm, seed=seed, random_state_seed=seed, **metric_of(search))


def tune_space(configs: TrialConfigs) -> dict[str, Any]:
    """Return the flat space of everything that a trial may ask for, in Ray Tune's terms."""
    return {name: _domain(value) for name, value in configs.asked.items()}


def _domain(value: Options) -> Any:
    if isinstance(value, Range):
        return (tune.loguniform if value.log else tune.uniform)(value.low, value.high)
    return tune.choice(list(value))


def loggers(names: Sequence[str], project: str) -> list[Any]:
    """Return Ray's logger callbacks by name. The config of a trial is its hyperparameters."""
    require_loggers(names)
    chosen = [LOGGERS[name] for name in names]
    return [getattr(importlib.import_module(module), callback)(**{key: project}) for module, callback, key in chosen]
