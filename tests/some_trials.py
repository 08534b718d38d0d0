"""Trials for the tests of reports: a conditional space in which some stop and some fail."""

from __future__ import annotations

import io
import json
import math
import random
from typing import Any

import pyarrow.parquet as pq

from mimkd_ray import storage
from mimkd_ray.search.trials import Point, Trial


def trial(number: int, state: Any = "completed", **fields: Any) -> Trial:
    """A trial without parameters, unless `fields` says otherwise."""
    return Trial(number=number, state=state, **{"params": {}, **fields})


def point(epoch: int, top1: float, nats: float | None = None) -> Point:
    """An evaluation whose other figures follow from its top-1."""
    return Point(
        epoch=epoch, step=10 * epoch, top1=top1, top5=min(100.0, 2 * top1), cross_entropy=4 - top1 / 25, nats=nats
    )


def search(count: int = 12) -> list[Trial]:
    """`count` trials: of every four one is completed, stopped, failed without a score, and failed with one."""
    draw = random.Random(0)
    trials = []
    for number in range(count):
        state = ("completed", "stopped", "failed", "failed")[number % 4]
        kind = ("", "early", "out of memory", "non-finite")[number % 4]
        params = {"optim.lr": 10 ** draw.uniform(-3, 0), "critic.kind": draw.choice(["concat", "separable"])}
        if params["critic.kind"] == "concat":
            params["critic.width"] = draw.choice([64, 128, 256, 512])
        epochs = (6, 3, 0, 2)[number % 4]
        curve = tuple(point(e, 40 + 3 * e + draw.random(), math.log(1 + e)) for e in range(1, epochs + 1))
        trials.append(
            trial(
                number,
                state,
                kind=kind,
                reason=f"because of {kind}" if kind else "trained to its end",
                params=params,
                score=curve[-1].top1 if curve else None,
                best_epoch=epochs or None,
                seconds=10.0 * epochs,
                config={"optim": {"lr": params["optim.lr"]}},
                curve=curve,
            )
        )
    return trials


def from_table(table: Any) -> tuple[list[Trial], str]:
    """Return the trials of a table, and their metric."""
    names = [field.name for field in table.schema if field.name.startswith("param/")]
    as_json = {name for name in names if (table.schema.field(name).metadata or {}).get(b"encoding") == b"json"}
    trials = []
    for row in table.to_pylist():
        params = {
            name.removeprefix("param/"): json.loads(row[name]) if name in as_json else row[name]
            for name in names
            if row[name] is not None
        }
        plain = {name: row[name] for name in ("number", "state", "kind", "reason", "score", "best_epoch", "seconds")}
        curve = tuple(Point(**point) for point in row["curve"])
        lived = tuple((epoch, own) for epoch, own in json.loads(row["schedule"]))
        trials.append(Trial(**plain, params=params, config=json.loads(row["config"]), curve=curve, schedule=lived))
    return trials, table.schema.metadata[b"metric"].decode()


def read_trials(url: str) -> tuple[list[Trial], str]:
    """Return the trials at `url`, and their metric."""
    return from_table(pq.read_table(io.BytesIO(storage.read_bytes(url))))
