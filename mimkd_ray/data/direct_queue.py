"""The data loader's queues without their threads, for messages that a pipe takes at once.

`multiprocessing.Queue` hands what is put to a thread of the process, which packs and sends it while the process goes
on. A loader process then sleeps about twice a batch until it has the interpreter again: some 1 % of the time of
decoding 64 small images. A message of a batch without its images (they are
in shared memory) is small; put into the pipe here it takes some microseconds.
"""

from __future__ import annotations

import copy
import multiprocessing
import multiprocessing.queues
import select
from multiprocessing.context import BaseContext
from multiprocessing.reduction import ForkingPickler
from typing import Any

AT_ONCE = select.PIPE_BUF - 4 if hasattr(select, "PIPE_BUF") else 0
"""Bytes that a pipe takes whole when it is writable, beside their length."""


class DirectQueue(multiprocessing.queues.Queue):
    """A queue whose `put` sends at once what cannot wait: small messages, while there is room in the pipe. Any other,
    and all after it, go through the thread, so that they keep their order and `put` never waits for a reader."""

    def put(self, obj: Any, block: bool = True, timeout: float | None = None) -> None:
        """Put `obj`."""
        if self._thread is None:  # type: ignore[attr-defined]
            message = ForkingPickler.dumps(obj)
            if len(message) <= AT_ONCE and self._sent(message):
                return
        super().put(obj, block, timeout)

    def _sent(self, message: Any) -> bool:
        """Send it if there is room; say whether there was."""
        writer = self._writer  # type: ignore[attr-defined]
        with self._wlock:  # type: ignore[attr-defined]
            room = select.poll()
            room.register(writer, select.POLLOUT)
            if not room.poll(0):
                return False
            self._sem.acquire()  # type: ignore[attr-defined]  # which `get` releases
            writer.send_bytes(message)
        return True


def direct_context() -> BaseContext | None:
    """The context of forked processes, with such queues; None where processes are started otherwise."""
    if multiprocessing.get_start_method() != "fork":
        return None
    context = copy.copy(multiprocessing.get_context("fork"))
    context.Queue = lambda maxsize=0: DirectQueue(maxsize, ctx=context)  # type: ignore[method-assign]
    return context
