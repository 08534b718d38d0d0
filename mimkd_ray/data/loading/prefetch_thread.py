"""Prefetching of an iterator's items in a thread, while the consumer works on earlier ones."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T")

LOOK_S = 0.1  # seconds between two checks of whether the consumer has stopped
JOIN_S = 5.0  # seconds that closing waits; a thread stuck in a slow read ends with the read or with the process
_END = object()


def in_thread(items: Iterator[T], depth: int) -> Iterator[T]:
    """Yield the items in order, with up to `depth` of them ready; an error is raised after the items before it.

    Items are made in the thread, and a generator is closed there. Closing this generator waits for that, at most
    JOIN_S.
    """
    ready: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: Any) -> bool:
        """Return whether the consumer took the item."""
        while not stop.is_set():
            try:
                ready.put(item, timeout=LOOK_S)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    break
        except BaseException as error:  # handed to the consumer, which raises it
            put((None, error))
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()
        put((_END, None))

    thread = threading.Thread(target=work, name="hand over", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stop.set()
        thread.join(JOIN_S)
