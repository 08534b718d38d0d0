"""Progress of units of work: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack

from tqdm import tqdm

from mimkd_ray import console
from mimkd_ray.data.prepare.work_units import Done

LINE_SECONDS = 10.0
"""Seconds between two lines of progress without a terminal."""


class Progress:
    """A progress bar on a terminal, otherwise a line every ten seconds; measured in bytes, because images differ in
    size.

    Speed is measured from the end of the first unit, because Ray starts its processes before that.
    """

    def __init__(self, title: str, total_bytes: int) -> None:
        self.title, self.total_bytes = title, max(total_bytes, 1)
        self.rows = self.bytes = 0
        self.shown = time.monotonic()
        self.first: tuple[float, int, int] | None = None  # time at which the first unit ended, its rows and bytes
        shows = sys.stderr.isatty()
        self.bar = tqdm(total=self.total_bytes, desc=title, bar_format="{desc} |{bar}|") if shows else None
        self._told = ExitStack()

    def __enter__(self) -> Progress:
        if self.bar is None:
            self._told.enter_context(console.phase(self.title))
        return self

    def __exit__(self, *error: object) -> None:
        self._told.close()
        if self.bar is not None:
            self.bar.close()
        elif error[0] is None:
            console.line(f"  {self.text(time.monotonic())}")

    def add(self, done: Done) -> None:
        """Count a finished unit, and update the display if it is due."""
        self.rows, self.bytes = self.rows + done.rows, self.bytes + done.bytes
        now = time.monotonic()
        if self.first is None:
            self.first = now, done.rows, done.bytes
        if self.bar is not None:
            self.bar.set_description_str(f"{self.title}: {self.text(now)}", refresh=False)
            self.bar.update(done.bytes)
        elif now - self.shown >= LINE_SECONDS:
            self.shown = now
            console.line(f"  {self.text(now)}")

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
