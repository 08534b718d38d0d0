from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimkd_ray.data.order.blocks import Blocks


@given(st.lists(st.integers(0, 7), min_size=1, max_size=20))
def test_against_a_list_of_rows(counts: list[int]) -> None:
    blocks = Blocks.of(counts)
    rows = [(block, row) for block, count in enumerate(counts) for row in range(count)]
    assert blocks.num_rows == len(rows)
    # Blocks that hold nothing at all are as good as none.
    if rows:
        assert blocks.num_blocks == len(counts)
        assert blocks.counts.tolist() == counts
        assert [blocks.rows(b) for b in range(len(counts))] == counts
        assert [blocks.start(b) for b in range(len(counts) + 1)] == [sum(counts[:b]) for b in range(len(counts) + 1)]
    found, inside = blocks.locate(range(len(rows)))
    assert list(zip(found.tolist(), inside.tolist(), strict=True)) == rows


@given(st.integers(1, 50), st.integers(1, 12))
def test_uniform(num_rows: int, block_rows: int) -> None:
    counts = [min(block_rows, num_rows - start) for start in range(0, num_rows, block_rows)]
    blocks = Blocks.uniform(num_rows, block_rows)
    assert blocks.counts.tolist() == counts
    same = Blocks.of(counts)
    assert same.block_rows == counts[0]
    assert np.array_equal(same.locate(np.arange(num_rows)), blocks.locate(np.arange(num_rows)))
    if num_rows >= block_rows:
        assert same == blocks


def test_uniform_blocks_have_no_arrays() -> None:
    blocks = Blocks.uniform(10**15, 256)
    assert len(pickle.dumps(blocks)) < 200
    assert blocks.start(10**12) == 256 * 10**12
    found, row = blocks.locate([10**15 - 1])
    assert (int(found[0]), int(row[0])) == divmod(10**15 - 1, 256)
    assert blocks.rows(blocks.num_blocks - 1) == 10**15 % 256 or 10**15 % 256 == 0


def test_equality_and_pickling() -> None:
    variants = [Blocks.of([3, 4]), Blocks.of([4, 3]), Blocks.of([3, 3, 1]), Blocks.of([3, 3, 2]), Blocks.of([2, 5, 1])]
    for i, a in enumerate(variants):
        copy = pickle.loads(pickle.dumps(a))  # noqa: S301
        assert (copy, hash(copy)) == (a, hash(a))
        assert all((a == b) == (i == k) for k, b in enumerate(variants))
    assert Blocks.of([3, 3, 1]) == Blocks.uniform(7, 3)
    assert Blocks.of([]).num_rows == 0


@pytest.mark.parametrize("make", [lambda: Blocks.uniform(5, 0), lambda: Blocks.uniform(-1, 3), lambda: Blocks.of([-1])])
def test_errors(make: object) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match="block"):
        make()
