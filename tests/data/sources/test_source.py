from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.data.sources.digits import DigitsSource
from mimkd_ray.data.sources.source import SubsetSource, stratified_split
from mimkd_ray.errors import UserError


def test_subset_keeps_ids_and_renumbers_positions() -> None:
    whole = DigitsSource("train")
    kept = [3, 64, 65, 70, 200, 1346]
    subset = SubsetSource(whole, kept)
    assert subset.num_rows == 6
    assert subset.blocks == Blocks.of([1, 3, 1, 1])
    assert [row.id for row in subset.read([5, 0, 2])] == [1346, 3, 65]
    assert subset.read([2])[0].name == whole.read([65])[0].name
    np.testing.assert_array_equal(subset.labels(), whole.labels()[kept])
    nested = SubsetSource(subset, [1, 5])
    assert [row.id for row in nested.read([0, 1])] == [64, 1346]
    assert nested.blocks == Blocks.of([1, 1])
    digests = {whole.digest, subset.digest, nested.digest, SubsetSource(whole, kept[:-1]).digest}
    assert len(digests) == 4


@pytest.mark.parametrize("positions", [[3, 2], [1, 1], [-1, 2], [0, 1347]])
def test_subset_wants_sorted_positions(positions: list[int]) -> None:
    with pytest.raises(ValueError, match="sorted"):
        SubsetSource(DigitsSource("train"), positions)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=80), st.data())
@settings(max_examples=150, deadline=None)
def test_count_split(label_list: list[int], data: st.DataObject) -> None:
    labels = np.array(label_list)
    count = data.draw(st.integers(0, len(labels)))
    rest, chosen = stratified_split(labels, count, 5)
    assert len(chosen) == count
    assert sorted([*rest.tolist(), *chosen.tolist()]) == list(range(len(labels)))
    sizes, taken = np.bincount(labels), np.bincount(labels[chosen], minlength=labels.max() + 1)
    # As equal as can be: a class is below another by more than one only if it is used up.
    used_up = taken == sizes
    assert all(used_up[c] or taken[c] >= taken.max() - 1 for c in range(len(sizes)))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=80), st.floats(0.0, 1.0))
@settings(max_examples=150, deadline=None)
def test_share_split(label_list: list[int], share: float) -> None:
    labels = np.array(label_list)
    rest, chosen = stratified_split(labels, share, 5)
    assert len(chosen) == round(share * len(labels))
    assert sorted([*rest.tolist(), *chosen.tolist()]) == list(range(len(labels)))
    sizes, taken = np.bincount(labels), np.bincount(labels[chosen], minlength=labels.max() + 1)
    assert np.all(np.abs(taken - share * sizes) < 1 + 1e-9)


def test_split_follows_the_seed() -> None:
    labels = np.repeat(np.arange(5), 40)
    splits = [stratified_split(labels, 50, seed)[1].tolist() for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    assert sum(a == b for a, b in zip(splits[0], range(0, 200, 4), strict=True)) < 30  # no pattern of places


def test_rows_without_a_label_are_a_class_whatever_their_number() -> None:
    plain, far = (np.where(np.arange(40) % 4 == 0, none, np.arange(40) % 4) for none in (-1, -(10**12)))
    for ours, theirs in zip(stratified_split(far, 8, 3), stratified_split(plain, 8, 3), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_too_many_rows() -> None:
    with pytest.raises(UserError, match="cannot choose 11 rows of a set of 10"):
        stratified_split(np.zeros(10, dtype=np.int64), 11, 0)
