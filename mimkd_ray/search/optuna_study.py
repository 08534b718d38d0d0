"""Optuna's part: spaces as its define-by-run functions, its samplers, and the configurations of a pack."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import optuna
from optuna.trial import TrialState

from mimkd_ray.config import SearchConfig
from mimkd_ray.errors import UserError
from mimkd_ray.search.configs import TrialConfigs
from mimkd_ray.search.suggest import grid, grid_values
from mimkd_ray.search.trials import Trial, Value, direction
from mimkd_ray.seeds import derive

MOST_COMBINATIONS = 10_000
"""Largest grid without a number of trials: to list it takes half a minute."""

STATES = {"completed": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}


class _Points:
    """An Optuna trial in which numbers are choices of so many values, as a grid's are."""

    def __init__(self, trial: Any, points: int) -> None:
        self.points, self.suggest_categorical = points, trial.suggest_categorical

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return self.suggest_categorical(name, grid_values(low, high, self.points, log))


class DefineByRun:
    """Search spaces as the define-by-run function that Ray Tune's OptunaSearch takes. It can be pickled."""

    def __init__(self, configs: TrialConfigs, points: int = 0) -> None:
        """``points``: numbers are choices of so many values; 0: they are numbers."""
        self.configs, self.points = configs, points

    def __call__(self, trial: Any) -> None:
        """Ask for every value of a trial."""
        self.configs.build(_Points(trial, self.points) if self.points else trial)


def sampler(search: SearchConfig, *where: int) -> optuna.samplers.BaseSampler:
    """Return Optuna's sampler for the algorithm. ``where``: numbers that tell apart those of one search."""
    optuna.logging.set_verbosity(logging.WARNING)
    seed = derive(search.seed, "search", *where) % 2**32  # NumPy's RandomState takes 32 bits
    if search.algorithm != "tpe":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True)


def combinations(search: SearchConfig, configs: TrialConfigs) -> list[dict[str, Value]]:
    """Return the combinations of a grid, at most ``search.trials``. Raises UserError for very many if that is 0."""
    found = list(islice(grid(configs.build, search.points), search.trials or MOST_COMBINATIONS + 1))
    if not search.trials and len(found) > MOST_COMBINATIONS:
        raise UserError(
            f"the grid has more than {MOST_COMBINATIONS:,} combinations, which are listed before the first trial: give "
            "--search.trials, fewer --search.points or less in --search.space"
        )
    return found


def draw_pack(search: SearchConfig, configs: TrialConfigs, pack: int, known: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return the hyperparameters of a pack's members: asked of Optuna, which is told of the trials that have ended, or
    the next ones of a grid. The last pack has what is left of ``search.trials``."""
    count = min(search.pack, search.trials - pack * search.pack) if search.trials else search.pack
    if search.algorithm == "grid":
        first = pack * search.pack
        return list(islice(grid(configs.build, search.points), first, first + count))
    # Independent draws are those of the same search without packs; others have a seed of the pack.
    first = pack * search.pack if search.algorithm == "random" and search.trials else 0
    own = sampler(search) if search.algorithm == "random" and search.trials else sampler(search, pack)
    study = optuna.create_study(sampler=own, direction=direction(search.metric))
    ask = DefineByRun(configs)
    for trial in known:
        if trial.state != "running":
            study.enqueue_trial(dict(trial.params))
            told = study.ask()
            ask(told)
            for point in trial.curve:
                told.report(getattr(point, search.metric), point.epoch)
            state = STATES[trial.state] if trial.score is not None else TrialState.FAIL
            study.tell(told, trial.score if state == TrialState.COMPLETE else None, state=state)
    members = []
    for _ in range(first + count):
        asked = study.ask()
        ask(asked)
        members.append(dict(asked.params))
    return members[first:]


def halving(config: SearchConfig, before: int, epoch: int, values: Mapping[int, float]) -> set[int]:
    """Return the trials of a pack to stop after ``epoch``, by synchronous successive halving: if a rung has come since
    the evaluation ``before``, the best one in ``config.reduction`` continue, else all do."""
    if config.scheduler == "none" or not has_rung(config, before, epoch):
        return set()
    kept = -(-len(values) // config.reduction)
    best = sorted(values, key=lambda number: values[number], reverse=direction(config.metric) == "maximize")
    return set(best[kept:])


def has_rung(config: SearchConfig, before: int, epoch: int) -> bool:
    """Return whether grace * reduction^k is after epoch ``before`` and not after ``epoch`` for any k."""
    rung = config.grace
    while rung <= before:
        rung *= config.reduction
    return rung <= epoch
