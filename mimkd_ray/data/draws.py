"""The random numbers of a crop: from torch's generator or, the same ones in half the time, from a seed alone.

torch's CPU generator and NumPy's oldest one are the same Mersenne Twister with the same seeding. After a seed torch
computes the next 624 numbers in 5 us, and needs 1 us a number more to hand them out; a crop takes five.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch

NUMBERS = 24
"""That are there after a seed: as many as ten tries for a crop, its place and a flip may take."""


class Span(NamedTuple):
    """A range of float32 numbers, as torch computes with it."""

    low: float
    high: float
    width: float

    @classmethod
    def of(cls, low: float, high: float) -> Span:
        """From low to high, both rounded to float32."""
        return cls(float(np.float32(low)), float(np.float32(high)), float(np.float32(high) - np.float32(low)))


ONE = Span.of(0.0, 1.0)


class Draws(Protocol):
    """Numbers as torch draws them for a float32 or int64 tensor of one element."""

    def uniform(self, span: Span) -> float:
        """Return one in [low, high)."""
        ...

    def exp_uniform(self, span: Span) -> float:
        """Return e to the power of one in [low, high)."""
        ...

    def below(self, stop: int) -> int:
        """Return one of 0..stop-1."""
        ...


class TorchDraws:
    """From torch's default generator."""

    def __init__(self) -> None:
        self._one = torch.empty(1)

    def uniform(self, span: Span) -> float:
        """Return one in [low, high)."""
        return self._one.uniform_(span.low, span.high).item()

    def exp_uniform(self, span: Span) -> float:
        """Return e to the power of one in [low, high)."""
        return self._one.uniform_(span.low, span.high).exp_().item()

    def below(self, stop: int) -> int:
        """Return one of 0..stop-1."""
        return int(torch.randint(0, stop, (1,)))


class SeededDraws:
    """The first NUMBERS that torch's default generator gives after `manual_seed(seed)`; it is left alone. 2 us."""

    def __init__(self, seed: int) -> None:
        """`seed` has 32 bits."""
        _by_seed(seed)
        self._next = iter(_numbers(NUMBERS).tolist()).__next__

    def uniform(self, span: Span) -> float:
        """Return one in [low, high)."""
        # 24 bits times 24 bits are exact here: rounded once, as by the fused multiply-add that torch is compiled to.
        return float(np.float32((self._next() & 0xFFFFFF) * 2.0**-24 * span.width + span.low))

    def exp_uniform(self, span: Span) -> float:
        """Return e to the power of one in [low, high)."""
        _one_value[0] = (self._next() & 0xFFFFFF) * 2.0**-24 * span.width + span.low
        _one.exp_()  # torch's own: others round differently
        return _one_value[0]

    def below(self, stop: int) -> int:
        """Return one of 0..stop-1."""
        return self._next() % stop


_twister = np.random.MT19937()
_numbers = _twister.random_raw
_by_seed = np.random.RandomState(_twister).seed  # the seeding that torch has
_one = torch.empty(1)
_one_value = _one.numpy().data
