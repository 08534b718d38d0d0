"""The algorithm of a search, by Optuna: the next hyperparameters, and the trials that are behind."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import optuna
from optuna.trial import TrialState

from mimkd_ray.config import Config, SearchConfig
from mimkd_ray.errors import UserError
from mimkd_ray.search.suggest import Suggest, grid, grid_values
from mimkd_ray.search.trials import Trial, Value, direction
from mimkd_ray.seeds import derive

V = TypeVar("V", bound=Value)

STATES = {"completed": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}


class Asked(NamedTuple):
    """A new trial: its hyperparameters and its config."""

    params: dict[str, Value]
    config: Config


class _Ask:
    """A `Suggest` that takes a space's values from an Optuna trial."""

    def __init__(self, trial: optuna.Trial, points: int) -> None:
        self.trial, self.points = trial, points

    def number(self, name: str, low: float, high: float, log: bool = False) -> float:
        if self.points:
            return self.choice(name, grid_values(low, high, self.points, log))
        return self.trial.suggest_float(name, low, high, log=log)

    def choice(self, name: str, options: Sequence[V]) -> V:
        return self.trial.suggest_categorical(name, list(options))


class Study:
    """The algorithm's state: it gives trials by number, records their evaluations and ends, and decides which to stop.

    It lives in memory: after a restart the trials so far are replayed, so that their records are the only state.
    """

    def __init__(self, config: SearchConfig, build: Callable[[Suggest], Config], known: Sequence[Trial]) -> None:
        """Replay ``known``, the trials of an earlier start, by number. Raises UserError if the space lacks their
        values."""
        optuna.logging.set_verbosity(logging.WARNING)
        self.config, self.build = config, build
        # After a restart, other draws than at the start. NumPy's RandomState takes 32 bits.
        seed = derive(config.seed, "search", len(known)) % 2**32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler: optuna.samplers.BaseSampler = (
                optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True)
                if config.algorithm == "tpe"
                else optuna.samplers.RandomSampler(seed=seed)
            )
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=config.grace, reduction_factor=config.reduction)
        self.study = optuna.create_study(sampler=sampler, pruner=pruner, direction=direction(config.metric))
        self._trials: dict[int, optuna.Trial] = {}
        self._grid: Iterator[dict[str, Value]] | None = None
        if config.algorithm == "grid":
            tried = [trial.params for trial in known]
            self._grid = (params for params in grid(build, config.points) if params not in tried)
        for trial in known:
            self._replay(trial)

    def _replay(self, trial: Trial) -> None:
        asked = self._ask(trial.number, trial.params)
        if asked.params != dict(trial.params):
            raise UserError(
                f"trial {trial.number} of an earlier start has {dict(trial.params)}, and the search space asks for "
                f"{asked.params}: it was changed; give the search another --run.name"
            )
        for point in trial.curve:
            self.report(trial.number, point.epoch, getattr(point, self.config.metric))
        if trial.state != "running":
            self.tell(trial.number, trial.state, trial.score)

    def _ask(self, number: int, fixed: Mapping[str, Value] | None = None) -> Asked:
        if fixed is not None:
            self.study.enqueue_trial(dict(fixed))
        trial = self._trials[number] = self.study.ask()
        config = self.build(_Ask(trial, self.config.points if self._grid is not None else 0))
        return Asked(dict(trial.params), config)

    def ask(self, number: int) -> Asked | None:
        """Return the next trial under this number; None if a grid is exhausted."""
        if self._grid is None:
            return self._ask(number)
        params = next(self._grid, None)
        return None if params is None else self._ask(number, params)

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Record an evaluation; return whether the trial is behind and should stop (asynchronous successive
        halving)."""
        trial = self._trials[number]
        trial.report(value, epoch)
        return self.config.scheduler == "asha" and trial.should_prune()

    def tell(self, number: int, state: str, score: float | None) -> None:
        """Record a trial's end."""
        value = score if state == "completed" else None
        self.study.tell(self._trials.pop(number), value, state=STATES[state] if score is not None else TrialState.FAIL)


def halving(config: SearchConfig, epoch: int, values: Mapping[int, float]) -> set[int]:
    """Return the trials of a pack to stop after ``epoch``, by synchronous successive halving: at a rung the best one in
    ``config.reduction`` continue; at other epochs all do."""
    if config.scheduler == "none" or not is_rung(config, epoch):
        return set()
    kept = -(-len(values) // config.reduction)
    best = sorted(values, key=lambda number: values[number], reverse=direction(config.metric) == "maximize")
    return set(best[kept:])


def is_rung(config: SearchConfig, epoch: int) -> bool:
    """Return whether ``epoch`` is grace * reduction^k."""
    rung = config.grace
    while rung < epoch:
        rung *= config.reduction
    return rung == epoch
