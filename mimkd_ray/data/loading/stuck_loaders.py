"""Waiting for loader processes, until this process is asked to stop and they do not answer."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Generator, Iterable
from typing import Any

from torch.utils.data import DataLoader

from mimkd_ray.data.loading.batches import Batches, Key
from mimkd_ray.data.loading.shared_memory import Answer, Answers
from mimkd_ray.errors import LOST_LOADER

logger = logging.getLogger(__name__)

TIMED_OUT = "DataLoader timed out"
"""Part of PyTorch's message, a RuntimeError, when it has waited for LOOK_SECONDS; the next call waits on."""
LOOK_SECONDS, STUCK_SECONDS = 1.0, 10.0
ASKED_TO_STOP = threading.Event()
"""Set when this process is asked to save and end. If loader processes have ended then, or give nothing for
STUCK_SECONDS because they are stopped or wait themselves, this process makes the batches: the step can be saved."""
_opening = threading.Lock()
_PIN_LOOP = "_pin_memory_loop"
"""Part of the name of the thread in which torch brings batches to pinned memory. torch does not tell of its end, after
which a batch is waited for without limit. If torch renames it, its end is not noticed here."""


def answers_of(loader: DataLoader[Any], keys: Iterable[Key], batches: Batches) -> Generator[Answer]:
    """Yield the answers of a loader to all keys. `batches` makes those that stuck processes leave out."""
    with _opening:  # another thread may open a loader too
        before, threads = set(multiprocessing.active_children()), set(threading.enumerate())
        on_death = signal.getsignal(signal.SIGCHLD)
        answers = iter(loader)
        own = set(multiprocessing.active_children()) - before
        pinning = [thread for thread in threading.enumerate() if thread not in threads and _PIN_LOOP in thread.name]
    if threading.current_thread() is threading.main_thread():
        # The loader's own handler would raise its error wherever this process is, also where Python prints and drops
        # it. Without it the next batch that is asked for raises one.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if on_death is None else on_death)
    given, stuck_at = 0, 0.0
    try:
        while not (stuck_at and time.monotonic() - stuck_at >= STUCK_SECONDS):
            try:
                answer = next(answers)
            except StopIteration:
                return
            except RuntimeError as error:
                if LOST_LOADER in str(error) and ASKED_TO_STOP.wait(LOOK_SECONDS):
                    break  # batch systems and torchrun send the request to all processes, and these end
                if TIMED_OUT not in str(error) or not all(thread.is_alive() for thread in pinning):
                    raise
                if ASKED_TO_STOP.is_set():
                    stuck_at = stuck_at or time.monotonic()
                continue
            yield answer
            given, stuck_at = given + 1, 0.0
        logger.warning("asked to stop, and loader processes have ended or do not answer: the step ends without them")
        _end(own)
        here = Answers(batches, None)
        yield from (here[key, None] for key in itertools.islice(keys, given, None))
    finally:
        del answers
        _end(own)


def _end(processes: set[Any]) -> None:
    """Kill those that are left, also stopped ones: torch and multiprocessing would wait for these for ever."""
    for process in processes & set(multiprocessing.active_children()):
        try:
            process.kill()
            process.join(LOOK_SECONDS)
        except RuntimeError as error:  # of torch's handler of SIGCHLD
            if LOST_LOADER not in str(error):
                raise
