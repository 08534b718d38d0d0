"""Axes of parameters: linear, logarithmic if the values span decades, or categories."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

from mimkd_ray.search.report.wording import value_text
from mimkd_ray.search.trials import Trial, Value

LOG_SPAN, LOG_SPAN_OF_FEW = 30.0, 8.0
"""Ratio of the largest to the smallest positive value from which an axis is logarithmic; the second applies to a few
different values, such as widths of 64, 128, 256 and 512."""

FEW = 6
"""Most different numbers that each have their own tick."""

SMALLEST, LARGEST = 1e-100, 1e100
"""Range of magnitudes that axes can show: browsers cannot draw numbers close to the limits of a double."""


def can_draw(value: float | None) -> TypeGuard[float]:
    """Return whether a number is given, finite, and of a magnitude that an axis can show."""
    return value is not None and (value == 0 or SMALLEST <= abs(value) <= LARGEST)


def spans_decades(values: Sequence[float]) -> bool:
    """Return whether numbers that can be drawn belong on a logarithmic axis."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    least = LOG_SPAN_OF_FEW if 2 < len(set(values)) <= FEW else LOG_SPAN
    return low > 0 and math.log10(high) - math.log10(low) >= math.log10(least)


def value_of(trial: Trial, name: str) -> Value | None:
    """Return a trial's value of a parameter; None if it has none, or a number that no axis can show."""
    value = trial.params.get(name)
    return None if isinstance(value, int | float) and not can_draw(value) else value


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A mapping of the values of a parameter to 0..1."""

    log: bool
    """True if numbers are placed by their logarithms."""
    low: float
    """The smallest number, or 0."""
    high: float
    """The largest number, or the last category's index."""
    categories: tuple[str, ...]
    """Texts of the categories in their order; () for numbers."""
    ticks: tuple[float, ...]
    """Numbers, or indices of categories, that get a label."""

    @classmethod
    def of(cls, values: Sequence[Value], allow_log: bool = True) -> Scale:
        """Return the scale of a parameter from all its values, at least one; numbers must be drawable."""
        numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) < len(values):
            # Values of different types cannot be ordered, so they are sorted by type first. Values with the same text
            # are one category.
            names = tuple(dict.fromkeys(value_text(v) for v in sorted(values, key=lambda v: (type(v).__name__, v))))
            return cls(
                log=False, low=0, high=len(names) - 1, categories=names, ticks=tuple(map(float, range(len(names))))
            )
        low, high, log = min(numbers), max(numbers), allow_log and spans_decades(numbers)
        distinct = sorted(set(numbers))
        if len(distinct) <= FEW:
            ticks = distinct
        elif log:
            decades = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
            step = max(1, len(decades) // FEW)
            ticks = [10.0**n for n in decades[::step]]
            ends = math.log10(low), math.log10(high)
            room = (ends[1] - ends[0]) / 12  # leaves out decades whose labels would touch those of an end
            ticks = [low, *(t for t in ticks if ends[0] + room < math.log10(t) < ends[1] - room), high]
        else:
            ticks = [low + (high - low) * part / 4 for part in range(5)]
        return cls(log=log, low=low, high=high, categories=(), ticks=tuple(ticks))

    def number(self, value: Value) -> float:
        """Return a number unchanged, and the index of a category."""
        return float(self.categories.index(value_text(value)) if self.categories else value)

    def place(self, number: float) -> float:
        """Return the place of a number (or an index): 0 for the lowest, 1 for the highest, 0.5 if there is only one."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        at = math.log10(number) if self.log else number
        return (at - low) / (high - low) if high > low else 0.5

    def label(self, tick: float) -> str:
        """Return the text of a tick."""
        if self.categories:
            return self.categories[int(tick)]
        return f"{tick:.0f}" if abs(tick) < 1e6 and tick == round(tick) else f"{tick:.3g}"
