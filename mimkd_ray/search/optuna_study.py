"""Optuna's part: its samplers, the combinations of a grid, and the configurations of a pack."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import optuna
from optuna.trial import TrialState

from mimkd_ray import console
from mimkd_ray.config import SearchConfig
from mimkd_ray.errors import UserError
from mimkd_ray.search.configs import TrialConfigs
from mimkd_ray.search.suggest import Grid, every_answer
from mimkd_ray.search.trials import Trial, direction
from mimkd_ray.seeds import derive

MOST_COMBINATIONS = 10_000
"""Largest grid without a number of trials: to list it takes half a minute."""

STATES = {"completed": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}


def sampler(search: SearchConfig, *where: int) -> optuna.samplers.BaseSampler:
    """Return Optuna's sampler for the algorithm. ``where``: numbers that tell apart those of one search."""
    optuna.logging.set_verbosity(logging.WARNING)
    seed = derive(search.seed, "search", *where) % 2**32  # NumPy's RandomState takes 32 bits
    if search.algorithm != "tpe":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True)


def combinations(search: SearchConfig, configs: TrialConfigs) -> Grid:
    """Return the combinations of a grid, at most ``search.trials``, and say so if there are more. Raises UserError for
    very many if that is 0."""
    found = list(islice(every_answer(configs.build, search.points), (search.trials or MOST_COMBINATIONS) + 1))
    if 0 < search.trials < len(found):
        console.line(
            f"the grid has more than {search.trials} combinations, of which the first are tried, and what is "
            "asked for first may have one value in all of them: --search.trials 0 tries the whole grid"
        )
        return found[:-1]
    if not search.trials and len(found) > MOST_COMBINATIONS:
        raise UserError(
            f"the grid has more than {MOST_COMBINATIONS:,} combinations, which are listed before the first trial: give "
            "--search.trials, fewer --search.points or less in --search.space"
        )
    return found


def draw_pack(
    search: SearchConfig, configs: TrialConfigs, pack: int, known: Sequence[Trial], grid: Grid | None = None
) -> list[dict[str, Any]]:
    """Return the hyperparameters of a pack's members: the next ones of ``grid``, or asked of Optuna, which is told of
    the trials that have ended. The last pack has what is left of ``search.trials``."""
    if grid:
        return grid[pack * search.pack :][: search.pack]
    count = min(search.pack, search.trials - pack * search.pack) if search.trials else search.pack
    # Independent draws are those of the same search without packs; others have a seed of the pack.
    same = search.algorithm == "random" and search.trials > 0
    first, own = (pack * search.pack, sampler(search)) if same else (0, sampler(search, pack))
    study = optuna.create_study(sampler=own, direction=direction(search.metric))
    for trial in known:
        if trial.state != "running":
            study.enqueue_trial(dict(trial.params))
            told = study.ask()
            configs.ask(told)
            for point in trial.curve:
                told.report(point.value(search.metric), point.epoch)
            state = STATES[trial.state] if trial.score is not None else TrialState.FAIL
            study.tell(told, trial.score if state == TrialState.COMPLETE else None, state=state)
    members = []
    for _ in range(first + count):
        asked = study.ask()
        configs.ask(asked)
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
