from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimkd_ray.data.order import random_numbers
from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.data.order.sample_order import Order, view_number
from mimkd_ray.errors import UserError


@st.composite
def orders(draw: st.DrawFn) -> Order:
    lanes = draw(st.integers(1, 4))
    lane_batch = draw(st.integers(2, 5))
    if draw(st.booleans()):
        blocks = Blocks.uniform(draw(st.integers(lanes * lane_batch, 90)), draw(st.integers(1, 9)))
    else:
        counts = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
        missing = lanes * lane_batch - sum(counts)
        blocks = Blocks.of(counts + ([missing] if missing > 0 else []))
    return Order(blocks, lanes, lane_batch, draw(st.integers(0, 2**40)), draw(st.integers(0, blocks.num_blocks + 2)))


def whole_line(order: Order, epoch: int) -> list[int]:
    """The definition, row by row."""
    first, blocks = 0, []
    for rows in order.blocks.counts.tolist():
        blocks.append(list(range(first, first + rows)))
        first += rows
    if order.window == 0:
        return random_numbers.permutation(first, order.seed, "rows", epoch).tolist()
    shuffled = [blocks[b] for b in random_numbers.permutation(len(blocks), order.seed, "blocks", epoch)]
    line: list[int] = []
    for window, start in enumerate(range(0, len(shuffled), order.window)):
        rows = [row for block in shuffled[start : start + order.window] for row in block]
        chance = random_numbers.raw(len(rows), order.seed, "window", epoch, window).tolist()
        line += [row for _, row in sorted(zip(chance, rows, strict=True))]
    return line


@given(orders(), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_against_a_slow_reference(order: Order, epoch: int) -> None:
    line = whole_line(order, epoch)
    assert order.stretch(epoch, 0, len(line)).tolist() == line
    piece = len(line) // (order.lanes * order.lane_batch) * order.lane_batch
    for lane in range(order.lanes):
        rest = line[lane * piece : (lane + 1) * piece]
        for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
            batch, rest = rest[: order.lane_batch], rest[order.lane_batch :]
            assert order.positions(step, lane).tolist() == batch
        assert not rest


@given(orders(), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_each_row_once_per_epoch_but_the_tail(order: Order, epoch: int) -> None:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    rows = np.concatenate([order.positions(s, lane) for s in steps for lane in range(order.lanes)])
    assert len(rows) == len(set(rows.tolist())) == order.steps_per_epoch * order.lanes * order.lane_batch
    assert order.num_rows - len(rows) < order.lanes * order.lane_batch
    assert set(rows.tolist()) <= set(range(order.num_rows))
    assert all(order.epoch_of(s) == epoch for s in steps)
    # The step behind the last one begins the next epoch, at its beginning.
    assert order.epoch_of(steps.stop) == epoch + 1
    start = order.stretch(epoch + 1, 0, order.lane_batch).tolist()
    assert order.positions(steps.stop, 0).tolist() == start


@given(orders(), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_workers_partition_the_lanes(order: Order, workers: int) -> None:
    """However lanes are dealt, the union over workers of what a step reads is the same."""
    for step in (0, order.steps_per_epoch - 1, order.steps_per_epoch):
        read = {
            lane: order.positions(step, lane).tolist()
            for rank in range(workers)
            for lane in range(rank, order.lanes, workers)
        }
        assert read == {lane: order.positions(step, lane).tolist() for lane in range(order.lanes)}
        assert len({row for rows in read.values() for row in rows}) == order.lanes * order.lane_batch


@pytest.mark.parametrize("blocks", [Blocks.uniform(1_281_167, 256), Blocks.of([999, 1000, 1001] * 427)])
@pytest.mark.parametrize("window", [0, 16, 400])
def test_a_large_epoch_has_each_row_once(blocks: Blocks, window: int) -> None:
    order = Order(blocks, 8, 64, seed=5, window=window)
    line = np.concatenate([order.stretch(3, s, min(s + 100_000, order.num_rows)) for s in range(0, 1_290_000, 100_000)])
    assert np.array_equal(np.sort(line), np.arange(order.num_rows))
    if window:
        rows = blocks.locate(line[: window * min(blocks.rows(0), 250)])[0]
        assert len(np.unique(rows)) <= window
        assert len(np.unique(rows[:256])) > min(window, 60) / 2


def test_uniform_blocks_given_as_a_list_have_the_same_order() -> None:
    a, b = Blocks.uniform(1003, 10), Blocks.of([10] * 100 + [3])
    assert Order(a, 2, 5, 1, 7).stretch(2, 0, 1003).tolist() == Order(b, 2, 5, 1, 7).stretch(2, 0, 1003).tolist()


@pytest.mark.parametrize("window", [0, 64])
def test_a_billion_rows_cost_no_memory(window: int) -> None:
    order = Order(Blocks.uniform(10**9, 256), 8, 64, seed=1, window=window)
    order.positions(0, 0)
    tracemalloc.start()
    for step in (1, 1_000_000, 10**9):
        positions = order.positions(step, 7)
        assert len(set(positions.tolist())) == 64
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


def test_a_window_is_local() -> None:
    blocks = Blocks.uniform(120, 10)
    line = Order(blocks, lanes=3, lane_batch=5, seed=1, window=2).stretch(0, 0, 120)
    for start in range(0, 120, 20):
        assert len({row // 10 for row in line[start : start + 20]}) == 2
    whole = Order(blocks, lanes=3, lane_batch=5, seed=1, window=0).stretch(0, 0, 120)
    assert len({row // 10 for row in whole[:20]}) > 4


def test_epochs_seeds_and_windows_differ() -> None:
    lines = [
        tuple(Order(Blocks.uniform(60, 10), 2, 3, seed=seed, window=window).stretch(epoch, 0, 60).tolist())
        for seed in (0, 1)
        for window in (0, 2, 3)
        for epoch in (0, 1, 2)
    ]
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize("window", [0, 1])
def test_the_dropped_tail_changes(window: int) -> None:
    order = Order(Blocks.of([10, 10, 3]), 1, 4, seed=0, window=window)
    tails = {tuple(sorted(order.stretch(epoch, 20, 23).tolist())) for epoch in range(5)}
    assert len(tails) > 3


@pytest.mark.parametrize("counts", [[10] * 6, [10, 9, 11, 10, 10, 10]])
def test_access_in_any_order_and_after_pickling_is_the_same(counts: list[int]) -> None:
    order = Order(Blocks.of(counts), 2, 3, seed=7, window=2)
    places = [(step, lane) for step in range(40) for lane in range(2)]
    forward = {p: order.positions(*p).tolist() for p in places}
    data = pickle.dumps(order)
    assert len(data) < 600
    fresh = pickle.loads(data)  # noqa: S301
    assert {p: fresh.positions(*p).tolist() for p in reversed(places)} == forward
    assert fresh == order


def test_numbers_never_change() -> None:
    """Golden values: runs must be resumable after an update of NumPy or of this code."""
    assert Order(Blocks.of([4, 4, 4]), 2, 3, seed=3, window=2).stretch(1, 0, 12).tolist() == GOLDEN_LINE
    assert Order(Blocks.uniform(10**9, 256), 8, 4, 3, 64).positions(10**6, 5).tolist() == GOLDEN_BILLION
    assert [view_number(1, epoch, 5) for epoch in range(5)] == GOLDEN_VIEWS


GOLDEN_LINE = [11, 10, 2, 1, 0, 9, 8, 3, 6, 7, 5, 4]
GOLDEN_BILLION = [949829872, 593394437, 966189853, 835159847]
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
        Order(**({"blocks": Blocks.uniform(30, 10), "lanes": 2, "lane_batch": 3, "seed": 0} | change))  # type: ignore[arg-type]


def test_view_numbers() -> None:
    assert [view_number(0, epoch, 0) for epoch in (0, 1, 17)] == [0, 1, 17]
    cycle = [view_number(3, epoch, 7) for epoch in range(14)]
    assert sorted(cycle[:7]) == list(range(7))
    assert cycle[:7] == cycle[7:]
    assert cycle != [view_number(4, epoch, 7) for epoch in range(14)]
