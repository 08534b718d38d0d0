"""Random numbers that are a pure function of (seed, purpose, epoch, part), without state and the same in every process.

They come from the raw 64-bit stream of a counter-based generator (Philox), whose values NumPy guarantees. Small
permutations are made by sorting such numbers, because NumPy may change its own shuffles between versions; large ones
are a Feistel network, which is evaluated and inverted at single places, whatever their size.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import isqrt

import numpy as np

SORTED_COUNT = 2**16  # the largest permutation that is made by sorting: 3 ms, then cached
KEPT = 64  # sorted permutations and their inverses cached per process: at most 32 MiB of each
ROUNDS = 8


def raw(count: int, seed: int, purpose: str, epoch: int = 0, part: int = 0) -> np.ndarray:
    """Return `count` uniform uint64 numbers. Different purposes, epochs and parts give unrelated streams."""
    # Not `seeds.derive`, whose numbers differ: orders, splits and caches of earlier releases follow from this key.
    key = [seed % 2**64, zlib.crc32(purpose.encode()) << 32 | epoch % 2**32]
    # The counter counts up from its lowest word; two parts differ in a higher word, so their streams never overlap.
    counter = np.array([0, 0, part, 0], dtype=np.uint64)
    return np.random.Philox(key=np.array(key, dtype=np.uint64), counter=counter).random_raw(count)


def permutation(count: int, seed: int, purpose: str, epoch: int = 0) -> np.ndarray:
    """Return a whole permutation of 0..count-1, int64, by sorting: 0.1 s for a million."""
    return np.argsort(raw(count, seed, purpose, epoch), kind="stable").astype(np.int64, copy=False)


@dataclass(frozen=True)
class Permutation:
    """A permutation of 0..count-1 that is evaluated place by place.

    Up to 2**16 numbers it is exactly uniform (sorted raw numbers, cached by the process). Above that, a look-up costs
    about 0.1 ms plus 1 us a place, and no memory.
    """

    count: int
    seed: int
    purpose: str
    epoch: int = 0
    part: int = 0

    def at(self, places: np.ndarray) -> np.ndarray:
        """Return the numbers at `places` (0..count-1), int64."""
        if self.count <= SORTED_COUNT:
            return _sorted(self)[places].astype(np.int64)
        return self._walk(places, self._forward)

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """Return the places of `numbers` (0..count-1), int64: the inverse of `at`."""
        if self.count <= SORTED_COUNT:
            return _inverse(self)[numbers].astype(np.int64)
        return self._walk(numbers, self._backward)

    # A Feistel network on pairs (high, low) with high < _highs and low < _lows: alternating rounds add a keyed hash of
    # one to the other, and are undone by subtracting it. _highs * _lows is hardly more than `count`, so almost no
    # number falls outside; one that does goes through the network again until it is inside ("cycle walking").

    @cached_property
    def _lows(self) -> np.uint64:
        return np.uint64(isqrt(self.count - 1) + 1)

    @cached_property
    def _highs(self) -> np.uint64:
        return np.uint64(-(-self.count // int(self._lows)))

    @cached_property
    def _keys(self) -> np.ndarray:
        return raw(ROUNDS, self.seed, self.purpose, self.epoch, self.part)

    def _forward(self, x: np.ndarray) -> np.ndarray:
        high, low = np.divmod(x, self._lows)
        for add_high, add_low in self._keys.reshape(-1, 2):
            high = _wrap(high + _hash(low, add_high, self._highs), self._highs)
            low = _wrap(low + _hash(high, add_low, self._lows), self._lows)
        return high * self._lows + low

    def _backward(self, x: np.ndarray) -> np.ndarray:
        high, low = np.divmod(x, self._lows)
        for add_high, add_low in self._keys.reshape(-1, 2)[::-1]:
            low = _wrap(low + self._lows - _hash(high, add_low, self._lows), self._lows)
            high = _wrap(high + self._highs - _hash(low, add_high, self._highs), self._highs)
        return high * self._lows + low

    def _walk(self, start: np.ndarray, step: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        x = step(np.asarray(start).astype(np.uint64))
        while (outside := np.flatnonzero(x >= np.uint64(self.count))).size:
            x[outside] = step(x[outside])
        return x.astype(np.int64)


def _hash(x: np.ndarray, key: np.uint64, below: np.uint64) -> np.ndarray:
    """Return keyed numbers in 0..below-1 (below < 2**32), uint64."""
    x = x + key  # the finaliser of SplitMix64; its high bits are the best mixed
    x = (x ^ (x >> _30)) * _FIRST
    x = (x ^ (x >> _27)) * _SECOND
    return ((x >> _32) * below) >> _32


def _wrap(x: np.ndarray, below: np.uint64) -> np.ndarray:
    return x - below * (x >= below)


_27, _30, _32 = np.uint64(27), np.uint64(30), np.uint64(32)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@lru_cache(maxsize=KEPT)
def _sorted(key: Permutation) -> np.ndarray:
    numbers = raw(key.count, key.seed, key.purpose, key.epoch, key.part)
    return np.argsort(numbers, kind="stable").astype(np.int32)


@lru_cache(maxsize=KEPT)
def _inverse(key: Permutation) -> np.ndarray:
    return np.argsort(_sorted(key)).astype(np.int32)
