"""Search spaces: functions that turn a base config into a trial's and ask Optuna for every value that may differ.

    def temperature(trial: Suggest, config: Config, taps: Candidates) -> Config:
        value = trial.suggest_float("critic.temperature", 0.02, 1.0, log=True)
        return replace(config, loss=replace(config.loss, critic=replace(config.loss.critic, temperature=value)))

A value that is requested under a condition exists only in the trials that meet it. One function serves every algorithm:
random draws and Optuna give one answer to each request, and a grid gives every combination of answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from mimkd_ray.by_name import told
from mimkd_ray.config import Config
from mimkd_ray.config.loss_presets import Kind
from mimkd_ray.errors import UserError
from mimkd_ray.search.trials import Value

Grid = list[dict[str, Value]]
"""Every combination of a grid, listed."""

V = TypeVar("V", bound=Value)


class Suggest(Protocol):
    """The part of an `optuna.Trial` that spaces use: grids, random draws and known values have no more."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return a number in [low, high]; ``log``: evenly spaced by factors."""

    def suggest_categorical(self, name: str, choices: Sequence[V]) -> V:
        """Return one of ``choices``, which are the same in every trial."""


@dataclass(frozen=True)
class Candidates:
    """Tap pairs "teacher:student" that a search may choose from, shallow to deep."""

    feature: tuple[str, ...]
    """Pairs of maps."""
    local: tuple[str, ...]
    """Pairs of the teacher's vector with a student's map."""
    default: Mapping[Kind, tuple[str, ...]]
    """Pairs that a loss without configured pairs would read, by kind of term."""


Space = Callable[[Suggest, Config, Candidates], Config]


def compose(spaces: Sequence[Space], base: Config, candidates: Candidates) -> Callable[[Suggest], Config]:
    """Return one function that applies all spaces in order. Its errors are UserErrors that name the space."""

    def build(trial: Suggest) -> Config:
        config = base
        for space in spaces:
            name = f"search.space {getattr(space, '__name__', repr(space))}"
            try:
                config = space(trial, config, candidates)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
            except Exception as error:  # the function is foreign code
                asks = isinstance(error, AttributeError) and str(error.name).startswith("suggest")
                hint = "; a space asks by suggest_float and suggest_categorical" if asks else ""
                raise UserError(f"{name} raised {told(error)}{hint}") from error
            if not isinstance(config, Config):
                raise UserError(f"{name} returned {config!r:.80}: return the changed config")
        return config

    return build


def check_range(name: str, low: float, high: float, log: bool) -> None:
    """Raise UserError for a range that holds no number; Optuna would do so within the first trial."""
    if not low <= high or math.isinf(high - low) or (log and low <= 0):
        wanted = "0 < low <= high" if log else "low <= high"
        raise UserError(f"the range of {name!r} is {low:g} to {high:g}: give finite numbers with {wanted}")


def check_choices(name: str, choices: Sequence[Any]) -> None:
    """Raise UserError for no choices."""
    if not len(choices):
        raise UserError(f"{name!r} has no choices: give one or more")


class Given:
    """A `Suggest` that gives the values of a trial, and records those that were asked for."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = params
        self.used: dict[str, Value] = {}

    def _value(self, name: str) -> Any:
        if name not in self.params:
            raise UserError(f"the search space asks for {name!r}, and the trial has only {', '.join(self.params)}")
        return self.params[name]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return the trial's number; one that a scheduler has moved out of the range is at its end."""
        self.used[name] = value = min(max(float(self._value(name)), low), high)
        return value

    def suggest_categorical(self, name: str, choices: Sequence[V]) -> V:
        """Return the trial's choice."""
        value = self._value(name)
        if value not in choices:
            raise UserError(f"the search space offers {list(choices)} for {name!r}, and the trial has {value!r}")
        self.used[name] = value
        return value


def grid_values(low: float, high: float, points: int, log: bool) -> list[float]:
    """Return ``points`` numbers from low to high, evenly spaced (by factors if ``log``)."""
    if points == 1:
        return [math.sqrt(low * high) if log else (low + high) / 2]
    shares = [at / (points - 1) for at in range(points)]
    middle = [low * (high / low) ** share if log else low + (high - low) * share for share in shares[1:-1]]
    return [low, *middle, high]


class _Path:
    """A `Suggest` that follows one path of the tree of all answers and records it."""

    def __init__(self, path: Sequence[int], points: int) -> None:
        self.path, self.points = list(path), points
        self.sizes: list[int] = []
        self.params: dict[str, Value] = {}

    def suggest_categorical(self, name: str, choices: Sequence[V]) -> V:
        if name in self.params:
            return self.params[name]  # type: ignore[return-value]
        check_choices(name, choices)
        at = len(self.sizes)
        if at == len(self.path):
            self.path.append(0)
        self.sizes.append(len(choices))
        self.params[name] = choices[self.path[at]]
        return choices[self.path[at]]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        check_range(name, low, high, log)
        return self.suggest_categorical(name, grid_values(low, high, self.points, log))


def every_answer(build: Callable[[Suggest], Config], points: int) -> Iterator[dict[str, Value]]:
    """Yield every combination of answers, including conditional ones: the last value changes fastest."""
    path: list[int] = []
    while True:
        walk = _Path(path, points)
        build(walk)
        yield walk.params
        path = walk.path
        while path and path[-1] + 1 == walk.sizes[len(path) - 1]:
            path.pop()
        if not path:
            return
        path[-1] += 1
