"""The records of a hyperparameter search, and trials.parquet: one row for each trial.

    number, state, kind, reason, score, best_epoch, seconds    the trial's state and result
    param/NAME                                                 double, int64, bool or string; null: it has none
    config                                                     the whole config, JSON
    curve                                                      list of evaluations, in the order they were made
    schedule                                                   of a member of a population, JSON: what it went through

The schema's metadata defines the score: `metric` and `direction`. Records hold all measured values, also NaN and
infinities, which are legal doubles in Parquet. The config is strict JSON, in which they become null.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, get_args

from mimkd_ray import storage
from mimkd_ray.errors import UserError, nearest
from mimkd_ray.train.records.run_dir import jsonable

State = Literal["running", "completed", "stopped", "failed"]
Value = float | int | str | bool

STATES = get_args(State)

DIRECTIONS: dict[str, Literal["maximize", "minimize"]] = {"top1": "maximize", "cross_entropy": "minimize"}
"""Metrics by which a search can score, and their better direction."""

_PARAM = "param/"
_JSON = {b"encoding": b"json"}
"""Metadata of a string column whose values differ in type between trials: each is JSON."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluation of a trial on held-out images."""

    epoch: int
    """Epochs trained at that time."""
    step: int
    """Steps trained at that time."""
    top1: float
    """Percent."""
    top5: float
    """Percent."""
    cross_entropy: float
    """Nats per image."""
    nats: float | None = None
    """Mutual information with the teacher, summed over the terms; None: not measured."""
    seconds: float | None = None
    """Seconds since the trial's start; None: not known."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial: its hyperparameters, its evaluations, and its end."""

    number: int
    """Number from 0, in the order of their start."""
    state: State
    """completed: trained to its end. stopped: ended early on purpose. failed: ended for the reason in `kind`."""
    kind: str = ""
    """Kind of the end: "", early, budget, out of memory, non-finite, error or lost."""
    reason: str = ""
    """Reason of the end, in one sentence."""
    params: Mapping[str, Value]
    """Hyperparameters of this trial; spaces are conditional, so others may have more."""
    score: float | None = None
    """Best held-out value so far, of the metric named in the table."""
    best_epoch: int | None = None
    """Epoch at which `score` was reached."""
    seconds: float = 0.0
    """Seconds from start to end, or so far."""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The whole config as JSON."""
    curve: tuple[Point, ...] = ()
    """Every evaluation."""
    schedule: tuple[tuple[int, Mapping[str, Value]], ...] = ()
    """Of a member of a population: the values that its weights were trained with, each with the last epoch of these. A
    member that goes on from another one has that one's past."""

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"trial {self.number} is in state {self.state!r}; states are {', '.join(STATES)}")


@dataclass(frozen=True, kw_only=True)
class Final:
    """One of the best trials, trained again with several seeds and scored on the held-out training rows."""

    trial: int
    """Number of the trial that its config comes from."""
    seeds: tuple[int, ...]
    top1: tuple[float, ...]
    """Percent, for each seed."""

    def __post_init__(self) -> None:
        if not self.seeds or len(self.seeds) != len(self.top1):
            raise ValueError(f"finalist {self.trial} has {len(self.top1)} results for {len(self.seeds)} seeds")

    @property
    def mean(self) -> float:
        """Mean top-1 over the seeds."""
        return math.fsum(self.top1) / len(self.top1)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over the seeds; None for one seed, and if a result is not finite."""
        if len(self.top1) < 2 or not all(map(math.isfinite, self.top1)):
            return None
        return statistics.stdev(self.top1)


def direction(metric: str) -> Literal["maximize", "minimize"]:
    """Return "maximize" or "minimize". Raises UserError for a metric by which no search scores."""
    if metric not in DIRECTIONS:
        known = " or ".join(DIRECTIONS)
        raise UserError(f"no metric {metric!r}: a search scores by {known}{nearest(metric, DIRECTIONS)}")
    return DIRECTIONS[metric]


def is_finite(value: float | None) -> TypeGuard[float]:
    """Return whether a number is given and finite."""
    return value is not None and math.isfinite(value)


def ranked(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """Return the trials that can be trained with, best first: completed or stopped, with a finite score.

    Equal scores keep the order of their numbers. Failed trials are left out, whatever score they had reached.
    """
    sign = -1.0 if direction(metric) == "maximize" else 1.0
    usable = [trial for trial in trials if trial.state in ("completed", "stopped") and is_finite(trial.score)]
    return sorted(usable, key=lambda trial: (sign * (trial.score or 0.0), trial.number))


def to_table(trials: Sequence[Trial], metric: str) -> Any:
    """Return the trials as a pyarrow Table, in their order. Parameters' columns are in the order of first use."""
    import pyarrow as pa

    point = pa.struct(
        [
            ("epoch", pa.int64()),
            ("step", pa.int64()),
            ("top1", pa.float64()),
            ("top5", pa.float64()),
            ("cross_entropy", pa.float64()),
            ("nats", pa.float64()),
            ("seconds", pa.float64()),
        ]
    )
    columns: list[tuple[Any, list[Any]]] = [
        (pa.field("number", pa.int64()), [trial.number for trial in trials]),
        (pa.field("state", pa.string()), [trial.state for trial in trials]),
        (pa.field("kind", pa.string()), [trial.kind for trial in trials]),
        (pa.field("reason", pa.string()), [trial.reason for trial in trials]),
        (pa.field("score", pa.float64()), [trial.score for trial in trials]),
        (pa.field("best_epoch", pa.int64()), [trial.best_epoch for trial in trials]),
        (pa.field("seconds", pa.float64()), [trial.seconds for trial in trials]),
        *(_param_column(name, [trial.params.get(name) for trial in trials]) for name in param_names(trials)),
        (pa.field("config", pa.string()), [_to_json(trial.config) for trial in trials]),
        (pa.field("curve", pa.list_(point)), [[dataclasses.asdict(p) for p in trial.curve] for trial in trials]),
        (pa.field("schedule", pa.string()), [json.dumps(trial.schedule) for trial in trials]),
    ]
    schema = pa.schema(
        [field for field, _ in columns], metadata={"metric": metric, "direction": direction(metric), "version": "1"}
    )
    return pa.table([pa.array(values, field.type) for field, values in columns], schema=schema)


def write_trials(url: str, trials: Sequence[Trial], metric: str) -> None:
    """Write trials.parquet to `url`, local or remote, atomically: readers see the old table or the new one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(to_table(trials, metric), sink, compression="zstd")
    storage.write_bytes(url, sink.getvalue().to_pybytes())


def param_names(trials: Sequence[Trial]) -> list[str]:
    """Return every parameter that a trial had, in the order of first use."""
    return list(dict.fromkeys(name for trial in trials for name in trial.params))


def _param_column(name: str, values: list[Value | None]) -> tuple[Any, list[Any]]:
    """Return the field and its values: of the narrowest type that represents every value exactly, else as JSON."""
    import pyarrow as pa

    there = [value for value in values if value is not None]
    types = {type(value) for value in there}
    widest = max((abs(value) for value in there if type(value) is int), default=0)
    for kinds, fits, arrow in (
        ({bool}, True, pa.bool_()),
        ({str}, True, pa.string()),
        ({int}, widest < 2**63, pa.int64()),
        ({int, float}, widest <= 2**53, pa.float64()),
    ):
        if types <= kinds and fits:
            return pa.field(_PARAM + name, arrow), values
    field = pa.field(_PARAM + name, pa.string(), metadata=_JSON)
    return field, [None if value is None else json.dumps(value) for value in values]


def _to_json(config: Mapping[str, Any]) -> str:
    return json.dumps(jsonable(config), allow_nan=False)
