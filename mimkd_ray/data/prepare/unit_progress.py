"""Progress of units of work, on the console."""

from __future__ import annotations

import time
from contextlib import ExitStack

from mimkd_ray import console
from mimkd_ray.data.prepare.work_units import Done


class Progress:
    """A phase of the console, measured in bytes, because images differ in size: shown as ``unit`` of so many.

    Speed is measured from the end of the first unit, because Ray starts its processes before that.
    """

    def __init__(self, title: str, total_bytes: int, unit: str = "MB", size: int = 10**6) -> None:
        self.title, self.total_bytes, self.unit, self.size = title, max(total_bytes, 1), unit, size
        self.rows = self.bytes = 0
        self.shown = time.monotonic()
        self.first: tuple[float, int, int] | None = None  # time at which the first unit ended, its rows and bytes
        self._told = ExitStack()

    def __enter__(self) -> Progress:
        self._told.enter_context(console.phase(self.title))
        return self

    def __exit__(self, *error: object) -> None:
        self._told.close()
        if error[0] is None:
            console.line(f"  {self.text(time.monotonic())}")

    def add(self, done: Done) -> None:
        """Count a finished unit, and update the display if it is due."""
        self.rows, self.bytes = self.rows + done.rows, self.bytes + done.bytes
        now = time.monotonic()
        if self.first is None:
            self.first = now, done.rows, done.bytes
        if now - self.shown >= console.current().every:
            self.shown = now
            amount = (self.bytes // self.size, self.total_bytes // self.size, self.unit)
            console.show(console.Status(self.title, *amount, figures=self.text(now)))

    def text(self, now: float) -> str:
        """Return "12,000 images, 43 %, 850 images/s, 2 min left"; the speed once two units have ended."""
        said = f"{self.rows:,} images, {100 * self.bytes / self.total_bytes:.0f} %"
        first_ended, first_rows, first_bytes = self.first or (now, 0, 0)
        seconds, size = now - first_ended, self.bytes - first_bytes
        if seconds <= 0 or size <= 0:
            return said
        left = seconds * (self.total_bytes - self.bytes) / size
        time_left = f"{left / 60:,.0f} min left" if left >= 100 else f"{left:.0f} s left"
        return f"{said}, {(self.rows - first_rows) / seconds:,.0f} images/s, {time_left}"
