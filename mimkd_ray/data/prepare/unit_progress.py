"""Progress of units of work, on the console."""

from __future__ import annotations

import time
from contextlib import ExitStack
from threading import RLock
from typing import Self

from mimkd_ray import console
from mimkd_ray.data.prepare.work_units import Done


class Progress:
    """A phase of the console for units of work, whose size is that of their images in bytes."""

    def __init__(self, title: str, total: int, unit: str = "MB", size: int = 10**6) -> None:
        """``total``: size of all units, in bytes; it is shown in a ``unit`` of ``size`` bytes. A subclass may measure
        otherwise."""
        self.title, self.total, self.unit, self.size = title, total, unit, size
        self.rows = self.amount = 0
        self.began = self.shown = time.monotonic()
        self.speed: tuple[console.LastMinute, console.LastMinute] | None = None
        """Of images and of the total, from the first that are done: before that, Ray starts its processes."""
        self.lock = RLock()
        self._told = ExitStack()

    def __enter__(self) -> Self:
        self._told.enter_context(console.phase(self.title))
        return self

    def __exit__(self, *error: object) -> None:
        self._told.close()
        if error[0] is None:
            figures = f", {self.figures()}" if self.figures() else ""
            console.line(f"  {self.rows:,} images in {console.clock(time.monotonic() - self.began)}{figures}")

    def add(self, done: Done) -> None:
        """Count a finished unit."""
        with self.lock:
            self.rows, self.amount = self.rows + done.rows, self.amount + done.bytes
            self.tell()

    def so_far(self) -> tuple[int, int]:
        """Return how many images and how much of the total are done."""
        return self.rows, self.amount

    def tell(self) -> None:
        """Update the display if that is due."""
        rows, amount = self.so_far()
        if self.speed is None:
            self.speed = console.LastMinute(rows), console.LastMinute(amount)
        images, speed = self.speed[0].rate(rows), self.speed[1].rate(amount)
        now = time.monotonic()
        if now - self.shown >= console.current().every:
            self.shown = now
            left = (self.total - amount) / speed if speed else None
            measure = (amount // self.size, self.total // self.size, self.unit)
            console.show(console.Status(self.title, *measure, images, left, self.figures()))

    def figures(self) -> str:
        """Return what else is to be shown."""
        return ""
