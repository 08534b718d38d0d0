from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from mimkd_ray.data.loading.prefetch_thread import in_thread
from mimkd_ray.errors import DamagedDataError


class Numbers:
    """Counts, notes what was made and whether it was closed, and fails where told."""

    def __init__(self, count: int, fails_at: int = -1) -> None:
        self.count, self.fails_at = count, fails_at
        self.made: list[int] = []
        self.closed = threading.Event()

    def __call__(self) -> Iterator[int]:
        try:
            for number in range(self.count):
                if number == self.fails_at:
                    raise DamagedDataError(f"number {number}")
                self.made.append(number)
                yield number
        finally:
            self.closed.set()


def _threads() -> int:
    return sum(thread.name == "hand over" for thread in threading.enumerate())


def test_all_items_in_order() -> None:
    numbers = Numbers(100)
    assert list(in_thread(numbers(), 3)) == list(range(100))
    assert numbers.closed.is_set()
    assert _threads() == 0


def test_so_many_are_ready_and_no_more() -> None:
    numbers = Numbers(100)
    items = in_thread(numbers(), 3)
    for taken in (1, 2, 10):
        while next(items) + 1 < taken:
            pass
        deadline = time.monotonic() + 10
        while len(numbers.made) < taken + 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(numbers.made) == taken + 4  # three in the queue and one in hand
    items.close()
    assert numbers.closed.is_set()
    assert _threads() == 0


def test_an_error_comes_after_the_items_before_it() -> None:
    numbers = Numbers(10, fails_at=4)
    items = in_thread(numbers(), 8)
    assert [next(items) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(DamagedDataError, match="number 4"):
        next(items)
    assert numbers.closed.is_set()
    assert _threads() == 0
