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
from typing import Any, NamedTuple, Protocol, TypeVar

from mimkd_ray.config import Config
from mimkd_ray.config.loss_presets import Kind
from mimkd_ray.errors import UserError
from mimkd_ray.search.trials import Value
from mimkd_ray.user_functions import told

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
                if isinstance(error, TypeError) and error.__traceback__ and not error.__traceback__.tb_next:
                    hint = "; a space is called as function(trial, config, pairs)"  # it was not even entered
                raise UserError(f"{name} raised {told(error)}{hint}") from error
            if not isinstance(config, Config):
                raise UserError(f"{name} returned {config!r:.80}: return the changed config")
        return config

    return build


class Range(NamedTuple):
    """The numbers from low to high; ``log``: evenly spaced by factors."""

    low: float
    high: float
    log: bool

    def values(self, points: int) -> list[float]:
        """Return so many numbers from low to high, evenly spaced."""
        low, high = self.low, self.high
        if points == 1:
            return [math.sqrt(low * high) if self.log else (low + high) / 2]
        shares = [at / (points - 1) for at in range(1, points - 1)]
        return [low, *(low * (high / low) ** each if self.log else low + (high - low) * each for each in shares), high]


Options = Range | tuple[Any, ...]
"""What a value may be."""


class Asked:
    """A `Suggest` that keeps what it was asked for, and its answers. Refuses what Optuna would refuse within the first
    trial."""

    def __init__(self, choose: Callable[[str, Options], Any]) -> None:
        """``choose`` is asked once for each name."""
        self.choose = choose
        self.asked: dict[str, Options] = {}
        self.params: dict[str, Value] = {}

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return a number of the range. Raises UserError for a range that holds none."""
        if not low <= high or math.isinf(high - low) or (log and low <= 0):
            wanted = "0 < low <= high" if log else "low <= high"
            raise UserError(f"the range of {name!r} is {low:g} to {high:g}: give finite numbers with {wanted}")
        return self._answer(name, Range(low, high, log))

    def suggest_categorical(self, name: str, choices: Sequence[V]) -> V:
        """Return one of the choices. Raises UserError for none."""
        if not len(choices):
            raise UserError(f"{name!r} has no choices: give one or more")
        return self._answer(name, tuple(choices))

    def _answer(self, name: str, options: Options) -> Any:
        if name not in self.params:
            self.asked[name], self.params[name] = options, self.choose(name, options)
        return self.params[name]


def given(params: Mapping[str, Any]) -> Asked:
    """Return the `Suggest` that gives the values of a trial: a number that a scheduler has moved out of its range is at
    the range's end."""

    def choose(name: str, options: Options) -> Any:
        if name not in params:
            raise UserError(f"the search space asks for {name!r}, and the trial has only {', '.join(params)}")
        value = params[name]
        if isinstance(options, Range):
            return min(max(float(value), options.low), options.high)
        if value not in options:
            raise UserError(f"the search space offers {list(options)} for {name!r}, and the trial has {value!r}")
        return options[options.index(value)]  # and not NumPy's scalar

    return Asked(choose)


def every_answer(build: Callable[[Suggest], Config], points: int) -> Iterator[dict[str, Value]]:
    """Yield every combination of answers, including conditional ones: the last value changes fastest. A number has
    ``points`` values."""
    path: list[int] = []
    sizes: list[int] = []

    def choose(_: str, options: Options) -> Any:
        values = options.values(points) if isinstance(options, Range) else options
        sizes.append(len(values))
        if len(path) < len(sizes):
            path.append(0)
        return values[path[len(sizes) - 1]]

    while True:
        sizes.clear()
        walk = Asked(choose)
        build(walk)
        yield walk.params
        while path and path[-1] + 1 == sizes[len(path) - 1]:
            path.pop()
        if not path:
            return
        path[-1] += 1
