from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimkd_ray.data import keyed
from mimkd_ray.data.order import Order, view_number
from mimkd_ray.errors import UserError


@st.composite
def orders(draw: st.DrawFn) -> Order:
    blocks = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=12)))
    lanes = draw(st.integers(1, 4))
    lane_batch = draw(st.integers(2, 5))
    missing = lanes * lane_batch - sum(blocks)
    blocks += (missing,) if missing > 0 else ()
    window = draw(st.integers(0, len(blocks) + 2))
    return Order(blocks, lanes, lane_batch, draw(st.integers(0, 2**40)), window)


@given(orders(), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_each_row_once_per_epoch_but_the_tail(order: Order, epoch: int) -> None:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    rows = np.concatenate([order.positions(s, lane) for s in steps for lane in range(order.lanes)])
    assert len(rows) == len(set(rows.tolist())) == order.steps_per_epoch * order.lanes * order.lane_batch
    assert order.num_rows - len(rows) < order.lanes * order.lane_batch
    assert set(rows.tolist()) <= set(range(order.num_rows))
    assert all(order.epoch_of(s) == epoch for s in steps)


@given(orders(), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_against_a_slow_reference(order: Order, epoch: int) -> None:
    blocks, start = [], 0
    for rows in order.block_rows:
        blocks.append(list(range(start, start + rows)))
        start += rows
    chance = keyed.raw(order.num_rows, order.seed, "rows", epoch).tolist()
    if order.window == 0:
        line = sorted(range(order.num_rows), key=lambda row: chance[row])
    else:
        shuffled = [blocks[b] for b in keyed.permutation(len(blocks), order.seed, "blocks", epoch)]
        line = []
        for first in range(0, len(shuffled), order.window):
            window = [row for block in shuffled[first : first + order.window] for row in block]
            numbers = chance[len(line) : len(line) + len(window)]
            line += [row for _, row in sorted(zip(numbers, window, strict=True))]
    piece = len(line) // (order.lanes * order.lane_batch) * order.lane_batch
    for lane in range(order.lanes):
        rest = line[lane * piece : (lane + 1) * piece]
        for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
            batch, rest = rest[: order.lane_batch], rest[order.lane_batch :]
            assert order.positions(step, lane).tolist() == batch
        assert not rest


def test_a_window_is_local() -> None:
    order = Order((10,) * 12, lanes=3, lane_batch=5, seed=1, window=2)
    line = order.line(0)
    for start in range(0, 120, 20):
        assert len({row // 10 for row in line[start : start + 20]}) == 2
    whole = Order((10,) * 12, lanes=3, lane_batch=5, seed=1, window=0).line(0)
    assert len({row // 10 for row in whole[:20]}) > 4


def test_epochs_seeds_and_windows_differ() -> None:
    lines = [
        tuple(Order((10,) * 6, 2, 3, seed=seed, window=window).line(epoch).tolist())
        for seed in (0, 1)
        for window in (0, 2, 3)
        for epoch in (0, 1, 2)
    ]
    assert len(set(lines)) == len(lines)


def test_the_dropped_tail_changes() -> None:
    order = Order((10, 10, 3), 1, 4, seed=0)
    tails = {tuple(sorted(order.line(epoch)[20:].tolist())) for epoch in range(5)}
    assert len(tails) == 5


def test_access_in_any_order_and_after_pickling_is_the_same() -> None:
    order = Order((10,) * 6, 2, 3, seed=7, window=2)
    places = [(step, lane) for step in range(40) for lane in range(2)]
    forward = {p: order.positions(*p).tolist() for p in places}
    fresh = pickle.loads(pickle.dumps(order))  # noqa: S301
    assert "_line" not in fresh.__dict__
    assert {p: fresh.positions(*p).tolist() for p in reversed(places)} == forward
    assert fresh == order


def test_numbers_never_change() -> None:
    """Golden values: runs must be resumable after an update of NumPy or of this code."""
    assert keyed.raw(3, 5, "rows", 2).tolist() == GOLDEN_RAW
    assert Order((4, 4, 4), 2, 3, seed=3, window=2).line(1).tolist() == GOLDEN_LINE
    assert [view_number(1, epoch, 5) for epoch in range(5)] == GOLDEN_VIEWS


GOLDEN_RAW = [1092329849125030095, 7045172966673314639, 535956977893805923]
GOLDEN_LINE = [10, 11, 1, 8, 2, 9, 0, 3, 5, 7, 4, 6]
GOLDEN_VIEWS = [3, 0, 1, 4, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lane_batch": 1}, "at least 2 images"),
        ({"lanes": 0}, "lanes = 0"),
        ({"window": -1}, "window = -1"),
        ({"lanes": 16}, r"30 rows.*needs 48 \(16 lanes x 3\)"),
    ],
)
def test_errors(change: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Order(**({"block_rows": (10,) * 3, "lanes": 2, "lane_batch": 3, "seed": 0} | change))  # type: ignore[arg-type]


def test_view_numbers() -> None:
    assert [view_number(0, epoch, 0) for epoch in (0, 1, 17)] == [0, 1, 17]
    cycle = [view_number(3, epoch, 7) for epoch in range(14)]
    assert sorted(cycle[:7]) == list(range(7))
    assert cycle[:7] == cycle[7:]
    assert cycle != [view_number(4, epoch, 7) for epoch in range(14)]
