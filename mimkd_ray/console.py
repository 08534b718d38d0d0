"""What a job tells people: lines, and what it does now, as a bar on a terminal, else as a line every ten seconds.

A process has one console. By default it shows on this process's own output; the workers of Ray send theirs to the
driver (on_ray/driver_console.py), and other ranks have none. No job is silent for ten seconds: what goes on is told
again then, with the time that it has taken, also while this process waits inside a library.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TextIO, TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")

BAR_SECONDS, LINE_SECONDS = 0.5, 8.0
"""Between two states of the bar, and between two plain lines about the same work."""

SILENCE_SECONDS, LOOK_SECONDS = 8.5, 0.5
"""After which the work that goes on is told again, whoever is at fault, and between two looks whether that is due."""

RATE_SECONDS, MARK_SECONDS = 60.0, 1.0
"""Over which rates are taken, and between two notes of what was done."""

BRIEF_SECONDS, STALE_SECONDS = 1.0, 20.0
"""Work that takes less is not told of, and rates are not told again after the latter."""


@dataclass(frozen=True)
class Status:
    """The work that goes on."""

    what: str
    done: int = 0
    total: int = 0
    """0: nobody knows how much there is."""
    unit: str = "steps"
    rate: float = 0.0
    """Images per second of the last minute; 0: not known."""
    left: float | None = None
    """Seconds."""
    figures: str = ""
    """The latest metrics."""

    def text(self) -> str:
        """One plain line."""
        count = f"{self.done:,} of {self.total:,} {self.unit}" if self.total else ""
        rate = f"{self.rate:,.0f} images/s" if self.rate else ""
        left = f"{clock(self.left)} left" if self.left is not None else ""
        return f"{self.what}: " + (", ".join(filter(None, (count, rate, left, self.figures))) or "goes on")


class LastMinute:
    """How fast work goes: in the last minute, or since it began if that is later. What came before, such as compiling,
    does not go on."""

    def __init__(self, done: float = 0) -> None:
        self._marks = deque([(time.monotonic(), done)])

    def rate(self, done: float) -> float:
        """Note that ``done`` is done by now. Return how much of it was done in a second."""
        now = time.monotonic()
        if now - self._marks[-1][0] >= MARK_SECONDS:
            self._marks.append((now, done))
        while len(self._marks) > 1 and now - self._marks[1][0] >= RATE_SECONDS:
            self._marks.popleft()
        since, first = self._marks[0]
        return (done - first) / max(now - since, 1e-9)


class Console(Protocol):
    """Where lines and work are told."""

    @property
    def every(self) -> float:
        """Seconds between two states that it wants: more would not be shown."""

    def line(self, text: str) -> None:
        """Tell one line."""

    def status(self, status: Status | None) -> None:
        """Tell of the work that goes on; None: it is over."""


def clock(seconds: float) -> str:
    """h:mm:ss"""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class Nobody:
    """The console of workers other than the first."""

    every = float("inf")

    def line(self, text: str) -> None:
        """Say nothing."""

    def status(self, status: Status | None) -> None:
        """Say nothing."""


class Shown:
    """The console of a process that people look at. ``out`` has the lines, ``bar_on`` the bar, if it is a terminal; by
    default they are the standard output and error of the moment."""

    def __init__(self, out: TextIO | None = None, bar_on: TextIO | None = None) -> None:
        self._out, self._bar_on = out, bar_on
        self._lock = threading.RLock()  # a signal's handler may speak while its thread does
        self._status: Status | None = None
        self._began = self._last = self._heard = time.monotonic()
        self._bars: list[Any] = []
        self._watched = False

    @property
    def every(self) -> float:
        """Seconds between two states that are shown."""
        return BAR_SECONDS if self._terminal() else LINE_SECONDS

    def _terminal(self) -> bool:
        """Return whether there is a terminal for a bar. One whose size nobody set gets lines."""
        on = self._bar_on or sys.stderr
        try:
            return on.isatty() and os.get_terminal_size(on.fileno()).columns > 0
        except OSError:  # a stream that takes a terminal's place
            return True

    def line(self, text: str) -> None:
        """Print one line, above the bar."""
        with self._lock:
            out = self._out or sys.stdout
            if self._bars:
                self._bars[0].write(text, file=out)
            else:
                print(text, file=out)
            out.flush()
            self._last = time.monotonic()

    def status(self, status: Status | None) -> None:
        """Draw the bar, or print a line if it is time for one."""
        with self._lock:
            if status is None or self._status is None or status.what != self._status.what:
                self._began = time.monotonic()
                self._erase()
            self._status, self._heard = status, time.monotonic()
            if status is None:
                return
            if self._terminal():
                self._draw(status)
            elif (status.total or status.figures) and time.monotonic() - self._last >= LINE_SECONDS:
                self.line(status.text())  # of what has no count only the watch tells, once it has taken a while
            if not self._watched:
                self._watched = True
                threading.Thread(target=self._watch, name="console", daemon=True).start()

    def _draw(self, status: Status) -> None:
        counted = replace(status, what="", figures="").text().removeprefix(": ") if status.total else ""
        shape = "{desc} {percentage:3.0f}%|{bar:20}| " + counted if status.total else "{desc} {elapsed}"
        if not self._bars:
            from tqdm import tqdm  # the first line of a job does not wait for it

            options: dict[str, Any] = {"file": self._bar_on or sys.stderr, "leave": False, "dynamic_ncols": True}
            first: dict[str, Any] = {"desc": status.what, "initial": status.done, "total": status.total or None}
            self._bars = [tqdm(bar_format=shape, position=0, **first, **options)]
            self._bars.append(tqdm(bar_format="{desc}", desc=status.figures, position=1, **options))
        bar, below = self._bars
        bar.n, bar.total, bar.bar_format = status.done, status.total or None, shape
        below.set_description_str(status.figures, refresh=False)
        for each in self._bars:
            each.refresh()

    def _erase(self) -> None:
        for bar in reversed(self._bars):
            bar.close()
        self._bars = []

    def _watch(self) -> None:
        """Never let a job be silent: draw the bar's clock, tell again what goes on."""
        while True:
            time.sleep(LOOK_SECONDS)
            with self._lock:
                now, status = time.monotonic(), self._status
                if status is None:
                    self._watched = False  # until something goes on again
                    return
                if (self._out or sys.stdout).closed:
                    continue
                for bar in self._bars:
                    bar.refresh()
                began = now - self._began
                if not self._bars and now - self._last >= SILENCE_SECONDS and began >= BRIEF_SECONDS:
                    age = now - self._heard
                    left = None if status.left is None or age >= STALE_SECONDS else max(0.0, status.left - age)
                    rate = status.rate if age < STALE_SECONDS else 0.0
                    taken = f", {clock(began)} so far" if left is None else ""  # of this stretch of the work alone
                    self.line(f"{replace(status, rate=rate, left=left).text()}{taken}")


_current: Console = Shown()


def current() -> Console:
    """The console of this process."""
    return _current


def use(console: Console) -> Console:
    """Make it the console of this process, which tells what goes on from now, and return the one before it."""
    global _current
    before, _current = _current, console
    before.status(None)
    show(None)
    return before


def line(text: str) -> None:
    """Tell one line."""
    _current.line(text)


def say_once(line: str) -> None:
    """Log a line, once in a run: data sets are opened and networks are built several times on the way to it, by the
    driver and by workers of Ray."""
    if line not in told:
        told.add(line)
        logger.warning("%s", line)


told: set[str] = set()
"""Lines that this process has told of the present run."""

_phases: list[Status] = []


def show(status: Status | None) -> None:
    """Tell of the work that goes on; None: it is over, and what it was a part of goes on."""
    _current.status(status or (_phases[-1] if _phases else None))


@contextmanager
def phase(what: str, total: int = 0, unit: str = "images", said: bool = True) -> Iterator[Callable[[int], None]]:
    """A with-block of work that may take a while. Yields a function that takes how much of ``total`` is done.

    ``said``: tell that it begins; else it is told only if it takes long. Of nested phases the inner one is shown.
    """
    status = Status(what, 0, total, unit)
    if said:
        line(what)
    _phases.append(status)
    _current.status(status)
    shown, speed = time.monotonic(), LastMinute()

    def advance(done: int) -> None:
        nonlocal shown
        now, rate = time.monotonic(), speed.rate(done)
        if now - shown >= _current.every:
            shown = now
            left = (total - done) / rate if rate and total else None
            _current.status(replace(status, done=done, rate=rate if unit == "images" else 0.0, left=left))

    try:
        yield advance
    finally:
        _phases.remove(status)
        show(None)


def counted(items: Iterable[T], size: Callable[[T], int], what: str, total: int, said: bool = False) -> Iterator[T]:
    """The items, which are told as a phase; ``size``: how much of ``total`` one of them is."""
    with phase(what, total, said=said) as advance:
        done = 0
        for item in items:
            yield item
            done += size(item)
            advance(done)
