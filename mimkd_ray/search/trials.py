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
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mimkd_ray import storage
from mimkd_ray.train.records.run_dir import jsonable

State = Literal["running", "completed", "stopped", "failed"]
Value = float | int | str | bool

STATES = get_args(State)

DIRECTIONS: dict[str, Literal["maximize", "minimize"]] = {
    "top1": "maximize",
    "cross_entropy": "minimize",
    "knn": "maximize",
}
"""Metrics by which a search can score, and their better direction."""

SCALARS = {
    "number": "int64",
    "state": "string",
    "kind": "string",
    "reason": "string",
    "score": "float64",
    "best_epoch": "int64",
    "seconds": "float64",
}
"""Fields of a trial that are columns of the table as they are, and Arrow's names of their types."""

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
    knn: float | None = None
    """Top-1 of the features by nearest neighbours, percent; None: not measured."""

    def value(self, metric: str) -> float:
        """Return a metric of it; NaN: not measured."""
        found = getattr(self, metric)
        return math.nan if found is None else float(found)


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


@dataclass(frozen=True, kw_only=True)
class Final:
    """One of the best trials, trained again with several seeds and scored on the held-out training rows."""

    trial: int
    """Number of the trial that its config comes from."""
    seeds: tuple[int, ...]
    top1: tuple[float, ...]
    """Percent, for each seed."""

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


def value_text(value: Value) -> str:
    """Return a parameter's value as text: 0.05, 128, true, nce. Floats with four digits."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def direction(metric: str) -> Literal["maximize", "minimize"]:
    """Return the better direction of a metric."""
    return DIRECTIONS[metric]


def ranked(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """Return the trials that can be trained with, best first: completed or stopped, with a finite score.

    Equal scores keep the order of their numbers. Failed trials are left out, whatever score they had reached.
    """
    sign = -1.0 if direction(metric) == "maximize" else 1.0
    scores = {trial.number: trial.score for trial in trials if trial.state in ("completed", "stopped")}
    finite = {number: sign * score for number, score in scores.items() if score is not None and math.isfinite(score)}
    return sorted((t for t in trials if t.number in finite), key=lambda trial: (finite[trial.number], trial.number))


def to_table(trials: Sequence[Trial], metric: str) -> Any:
    """Return the trials as a pyarrow Table, in their order. Parameters' columns are in the order of first use."""
    import pyarrow as pa

    point = pa.struct([(f.name, "int64" if f.type == "int" else "float64") for f in dataclasses.fields(Point)])
    rows = [
        {
            **vars(trial),
            "config": json.dumps(jsonable(trial.config), allow_nan=False),
            "curve": [vars(point) for point in trial.curve],
            "schedule": json.dumps(trial.schedule),
        }
        for trial in trials
    ]
    columns = [*SCALARS.items(), ("config", "string"), ("curve", pa.list_(point)), ("schedule", "string")]
    metadata = {"metric": metric, "direction": direction(metric), "version": "1"}
    table = pa.Table.from_pylist(rows, pa.schema(columns, metadata=metadata))
    for at, name in enumerate(param_names(trials), len(SCALARS)):
        table = table.add_column(at, *_param_column(name, [trial.params.get(name) for trial in trials]))
    return table


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


def _param_column(name: str, values: list[Value | None]) -> tuple[Any, Any]:
    """Return the field and its values: of the type that Arrow has for all of them, else as JSON."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    with suppress(pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        if bool not in kinds or kinds == {bool}:  # Arrow takes True for 1.0
            found = pa.array(values)
            return pa.field(_PARAM + name, found.type), found
    texts = pa.array([None if value is None else json.dumps(value) for value in values])
    return pa.field(_PARAM + name, texts.type, metadata=_JSON), texts
