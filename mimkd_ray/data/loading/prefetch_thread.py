"""Items of an iterator, made ready in a thread while the consumer works on the ones before."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T")

LOOK_S = 0.1  # between two looks at whether anybody still wants more
JOIN_S = 5.0  # for which closing waits; a thread that hangs in a slow read ends with it, or with the process
_END = object()


def in_thread(items: Iterator[T], depth: int) -> Iterator[T]:
    """Yield the items in their order, up to `depth` of them ready; an error comes after the items before it.

    Items are made in the thread, and a generator is closed there. Closing this one waits for it, but not for ever.
    """
    ready: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: Any) -> bool:
        """Say whether it was taken in."""
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
