"""Axes of parameters: where values lie, which ticks they get, and what no axis can show."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from some_trials import trial

from mimkd_ray.search.report.axes import LARGEST, Scale, can_draw, spans_decades, value_of

NUMBERS = st.one_of(st.floats(allow_nan=False), st.integers(-(10**99), 10**99)).filter(can_draw)


@given(st.lists(NUMBERS, min_size=1, max_size=12))
def test_numbers_lie_between_0_and_1_in_their_order(values: list[float]) -> None:
    scale = Scale.of(values)
    ordered = sorted(values)
    places = [scale.place(scale.number(value)) for value in ordered]
    assert places == sorted(places)
    assert all(0 <= place <= 1 for place in places)
    if float(ordered[0]) < float(ordered[-1]) and not math.isclose(ordered[0], ordered[-1]):
        assert (places[0], places[-1]) == (pytest.approx(0), pytest.approx(1))
    assert all(-1e-9 <= scale.place(tick) <= 1 + 1e-9 for tick in scale.ticks)


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ([0.001, 0.01, 0.1], True),
        ([0.02, 0.3, 0.31, 0.4, 0.5, 0.55, 0.59], False),
        ([0.01, 0.3, 0.31, 0.4, 0.5, 0.55, 0.59], True),
        ([64, 128, 256, 512], True),
        ([1, 2, 3, 4], False),
        ([0.0, 1000.0], False),
        ([-1.0, 1000.0], False),
        ([7.0], False),
        ([], False),
    ],
)
def test_values_that_span_decades_are_logarithmic(values: list[float], log: bool) -> None:
    assert spans_decades(values) is log
    if values:
        assert Scale.of(values).log is log
        assert not Scale.of(values, allow_log=False).log


def test_places_and_ticks() -> None:
    lr = Scale.of([10 ** (-n / 4) for n in range(13)])  # 1 down to 0.001
    assert [lr.label(tick) for tick in lr.ticks] == ["0.001", "0.01", "0.1", "1"]
    assert lr.place(0.1) == pytest.approx(2 / 3)
    linear = Scale.of([float(n) for n in range(9)])
    assert [linear.label(tick) for tick in linear.ticks] == ["0", "2", "4", "6", "8"]
    assert linear.place(2) == 0.25
    width = Scale.of([512, 64, 1024])
    assert [width.label(tick) for tick in width.ticks] == ["64", "512", "1024"]
    assert Scale.of([3.0]).place(3.0) == 0.5


def test_categories() -> None:
    kinds = Scale.of(["nce", "dv", "nce"])
    assert kinds.categories == ("dv", "nce")
    assert [(kinds.number(kind), kinds.place(kinds.number(kind))) for kind in ("dv", "nce")] == [(0, 0), (1, 1)]
    assert Scale.of([True, False]).categories == ("false", "true")
    assert Scale.of(["auto", 2, True, 0.5]).categories == ("true", "0.5", "2", "auto")


def test_what_no_axis_can_show_is_as_good_as_missing() -> None:
    params = {
        "nan": math.nan,
        "inf": -math.inf,
        "huge": 10**400,
        "tiny": 5e-324,
        "fine": LARGEST,
        "no": False,
        "text": "x",
    }
    assert {name: value_of(trial(0, params=params), name) for name in [*params, "other"]} == {
        **dict.fromkeys(["nan", "inf", "huge", "tiny", "other"]),
        "fine": LARGEST,
        "no": False,
        "text": "x",
    }
