"""Locks between the processes and threads of a machine, which say that they wait and do not wait for ever."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mimkd_ray.errors import UserError

logger = logging.getLogger(__name__)

TELL_SECONDS, LOCK_SECONDS, PAUSE_SECONDS = 10.0, 60.0, 0.05
"""Of a wait for a lock: when it is told, when the block is read without the store, and between two tries, at most."""


class HeldError(UserError):
    """A lock that another process does not give back."""


_given_up: set[Path] = set()


@contextlib.contextmanager
def locked(path: Path, seconds: float | None = None, waits: Callable[[], object] | None = None) -> Iterator[int]:
    """Hold the lock of the file, created if missing, against all processes and threads of this machine.

    Raises HeldError if another one holds it for `seconds` (LOCK_SECONDS); from then on it is not waited for. `waits`
    tells of a wait of TELL_SECONDS in words of its own.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _lock(file, path, LOCK_SECONDS if seconds is None else seconds, waits)
        yield file
    finally:
        # Unlocked explicitly: a process forked in the meantime has the file open and so would keep the lock.
        fcntl.flock(file, fcntl.LOCK_UN)
        os.close(file)


def _lock(file: int, path: Path, seconds: float, waits: Callable[[], object] | None) -> None:
    began, pause, told = time.monotonic(), 0.001, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _given_up.discard(path)
            return
        except BlockingIOError:
            waited = time.monotonic() - began
        if waited >= seconds or path in _given_up:
            _given_up.add(path)
            raise HeldError(
                f"another process holds {path} for longer than {seconds:g} s: it reads slow storage, or is stopped; "
                f"then let it go on or end it (fuser {path} names it)"
            )
        if waited >= TELL_SECONDS and not told:
            told = True
            if waits is not None:
                waits()
            else:
                logger.warning("waiting for %s, which another process holds, for at most %g s", path, seconds)
        time.sleep(pause)
        pause = min(2 * pause, PAUSE_SECONDS)
