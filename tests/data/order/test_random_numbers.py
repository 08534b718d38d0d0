from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimkd_ray.data.order import random_numbers
from mimkd_ray.data.order.random_numbers import Permutation, permutation, raw


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 9), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_bijection_and_its_inverse(count: int, seed: int, epoch: int, network: bool) -> None:
    chosen = Permutation(count, seed, "test", epoch)
    with pytest.MonkeyPatch.context() as patch:
        if network:
            patch.setattr(random_numbers, "SORTED_COUNT", 0)
        numbers = chosen.at(np.arange(count))
        assert sorted(numbers.tolist()) == list(range(count))
        assert chosen.places(numbers).tolist() == list(range(count))


@pytest.mark.parametrize("count", [2**16 + 1, 2**18, 999_983, 1_281_167])
def test_a_large_bijection(count: int) -> None:
    chosen = Permutation(count, 3, "test", 1)
    numbers = chosen.at(np.arange(count))
    assert np.array_equal(np.bincount(numbers, minlength=count), np.ones(count))
    assert np.array_equal(chosen.places(numbers), np.arange(count))


def test_single_places_of_a_huge_one() -> None:
    chosen = Permutation(10**12 + 39, 3, "test")
    places = np.array([0, 1, 2, 10**9, 10**12 + 38])
    numbers = chosen.at(places)
    assert len(set(numbers.tolist())) == 5
    assert numbers.min() >= 0
    assert numbers.max() < 10**12 + 39
    assert np.array_equal(chosen.places(numbers), places)


def test_small_ones_sort_raw_numbers() -> None:
    assert Permutation(100, 5, "x", 2).at(np.arange(100)).tolist() == permutation(100, 5, "x", 2).tolist()


def test_every_part_of_the_key_counts() -> None:
    keys = [(1, "a", 0, 0), (2, "a", 0, 0), (1, "b", 0, 0), (1, "a", 1, 0), (1, "a", 0, 1)]
    for count in (50, 100_000):
        made = {tuple(Permutation(count, *key).at(np.arange(50)).tolist()) for key in keys}
        assert len(made) == len(keys)
    assert len({tuple(raw(4, *key).tolist()) for key in keys}) == len(keys)


@pytest.mark.parametrize("count", [70_000, 1_000_003])
def test_neighbours_are_spread_uniformly(count: int) -> None:
    """Chi-square over a 10x10 grid: the numbers at two neighbouring places, over 1,600 keys."""
    cells = np.zeros((10, 10))
    for seed in range(1600):
        a, b = Permutation(count, seed, "test").at(np.array([4321, 4322])) * 10 // count
        cells[a, b] += 1
    chi2 = float(((cells - 16) ** 2 / 16).sum())  # 99 degrees of freedom: 148 is exceeded once in a thousand
    assert 56 < chi2 < 148


@pytest.mark.parametrize("distance", [1, 2, 257, 1024])
def test_places_at_any_distance_are_unrelated_within_one_key(distance: int) -> None:
    count, grid = 1_000_003, 16
    numbers = Permutation(count, 11, "test").at(np.arange(count)) * grid // count
    cells = np.bincount(numbers[:-distance] * grid + numbers[distance:], minlength=grid * grid)
    expected = (count - distance) / grid**2
    chi2 = float(((cells - expected) ** 2 / expected).sum())  # 255 degrees of freedom, mean 255, deviation 22.6
    assert 170 < chi2 < 335


def test_numbers_never_change() -> None:
    """Golden values: runs must be resumable after an update of NumPy or of this code."""
    assert raw(3, 5, "rows", 2).tolist() == GOLDEN_RAW
    assert Permutation(10**9, 1, "rows", 3).at(np.arange(4)).tolist() == GOLDEN_NETWORK


GOLDEN_RAW = [1092329849125030095, 7045172966673314639, 535956977893805923]
GOLDEN_NETWORK = [966666862, 122450052, 522261118, 909479432]
