"""trials.parquet: what a search has recorded comes back as it was, from a local disk and from S3."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from some_trials import from_table, read_trials

from mimkd_ray import storage
from mimkd_ray.search.trials import (
    Final,
    Point,
    Trial,
    ranked,
    to_table,
    write_trials,
)

INT64 = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False)  # infinities included; NaN is unequal to itself and has its own test
TEXT = st.text(max_size=12)
KINDS = st.sampled_from(["", "early", "budget", "out of memory", "non-finite", "error", "lost"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
POINTS = st.builds(
    Point,
    epoch=INT64,
    step=INT64,
    top1=FLOATS,
    top5=FLOATS,
    cross_entropy=FLOATS,
    nats=st.none() | FLOATS,
)
TRIALS = st.builds(
    Trial,
    number=INT64,
    state=st.sampled_from(["running", "completed", "stopped", "failed"]),
    kind=KINDS,
    reason=TEXT,
    params=st.dictionaries(
        st.sampled_from(["lr", "a/b", "", "état"]), FLOATS | st.integers() | TEXT | st.booleans(), max_size=4
    ),
    score=st.none() | FLOATS,
    best_epoch=st.none() | INT64,
    seconds=FLOATS,
    config=st.dictionaries(TEXT, JSON, max_size=3),
    curve=st.lists(POINTS, max_size=3).map(tuple),
)


def trial(number: int, state: Any = "completed", **fields: Any) -> Trial:
    return Trial(number=number, state=state, **{"params": {}, **fields})


@settings(max_examples=30)
@given(st.lists(TRIALS, max_size=4), st.sampled_from(["top1", "cross_entropy"]))
def test_a_table_gives_every_trial_back(trials: list[Trial], metric: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(to_table(trials, metric), sink)
    back, its_metric = from_table(pq.read_table(pa.BufferReader(sink.getvalue())))
    assert its_metric == metric
    assert back == trials


@pytest.mark.parametrize(
    ("values", "arrow"),
    [
        ([1, 2, None], pa.int64()),
        ([1, 0.5, None], pa.float64()),
        ([True, None, False], pa.bool_()),
        (["a", None, "b"], pa.string()),
        ([1, "auto", None], pa.string()),
        ([1, True, None], pa.string()),
        ([0.5, True, None], pa.string()),
        ([2**63, 1, None], pa.string()),
        ([2**53 + 1, 0.5, None], pa.string()),
    ],
)
def test_a_parameter_keeps_its_type(values: list[Any], arrow: Any) -> None:
    trials = [trial(i, params={} if value is None else {"x": value}) for i, value in enumerate(values)]
    table = to_table(trials, "top1")
    column = table.column("param/x")
    assert column.type == arrow
    assert [v is None for v in column.to_pylist()] == [v is None for v in values]
    back, _ = from_table(table)
    assert back == trials
    if arrow != pa.float64():
        assert [type(t.params.get("x")) for t in back] == [type(v) for v in values]


def test_the_columns_are_typed_and_say_what_a_score_is() -> None:
    point = Point(epoch=1, step=10, top1=50.0, top5=80.0, cross_entropy=1.5, nats=2.0)
    trials = [trial(0, params={"lr": 0.1}, score=50.0, best_epoch=1, config={"a": [1]}, curve=(point,)), trial(1)]
    table = to_table(trials, "cross_entropy")
    assert table.schema.metadata == {b"metric": b"cross_entropy", b"direction": b"minimize", b"version": b"1"}
    assert table.schema.names == [
        *(
            "number",
            "state",
            "kind",
            "reason",
            "score",
            "best_epoch",
            "seconds",
            "param/lr",
            "config",
            "curve",
            "schedule",
        )
    ]
    assert pa.types.is_list(table.schema.field("curve").type)
    assert table.column("curve").to_pylist()[0] == [
        {"epoch": 1, "step": 10, "top1": 50.0, "top5": 80.0, "cross_entropy": 1.5, "nats": 2.0, "knn": None}
    ]
    assert json.loads(table.column("config")[0].as_py()) == {"a": [1]}
    assert to_table([], "top1").num_rows == 0


def test_numbers_that_are_not_finite_are_kept_and_the_config_stays_strict_json() -> None:
    nan, inf = math.nan, math.inf
    point = Point(epoch=1, step=1, top1=nan, top5=inf, cross_entropy=nan)
    table = to_table([trial(0, params={"lr": nan}, score=-inf, config={"x": nan}, curve=(point,))], "top1")
    assert table.column("config")[0].as_py() == '{"x": null}'
    (back,), _ = from_table(table)
    assert math.isnan(float(back.params["lr"]))
    assert back.score == -inf
    assert math.isnan(back.curve[0].top1)
    assert (back.curve[0].top5, back.curve[0].nats) == (inf, None)


def test_on_a_disk_and_on_s3(tmp_path: Path, bucket: str) -> None:
    trials = [trial(0, params={"lr": 0.1, "bound": "nce"}, score=1.0), trial(1, "failed", kind="error", reason="why")]
    for place in (str(tmp_path / "search"), bucket):
        url = storage.join(place, "trials.parquet")
        with pytest.raises(FileNotFoundError):
            read_trials(url)
        write_trials(url, trials, "top1")
        assert read_trials(url) == (trials, "top1")
    assert pq.read_table(tmp_path / "search" / "trials.parquet").num_rows == 2


def test_best_first_without_those_that_failed_or_have_no_score() -> None:
    trials = [
        trial(0, score=50.0),
        trial(1, "stopped", score=60.0),
        trial(2, "failed", score=90.0),
        trial(3, "running", score=95.0),
        trial(4, score=math.nan),
        trial(5, score=math.inf),
        trial(6),
        trial(7, score=60.0),
        trial(8, score=0.0),
    ]
    assert [t.number for t in ranked(trials, "top1")] == [1, 7, 0, 8]
    assert [t.number for t in ranked(trials, "cross_entropy")] == [8, 0, 1, 7]


def test_a_finalist_has_mean_and_spread() -> None:
    final = Final(trial=3, seeds=(0, 1, 2), top1=(70.0, 71.0, 73.0))
    assert final.mean == pytest.approx(214 / 3)
    deviations = [(x - 214 / 3) ** 2 for x in final.top1]
    assert final.sd == pytest.approx(math.sqrt(sum(deviations) / 2))
    assert Final(trial=3, seeds=(0,), top1=(70.0,)).sd is None
    assert Final(trial=3, seeds=(0, 1), top1=(70.0, math.nan)).sd is None
