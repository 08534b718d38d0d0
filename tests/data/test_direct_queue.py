"""Queues of the data loader: what is put arrives, in order and without waiting, small or large, read or not."""

from __future__ import annotations

import multiprocessing
import queue
import threading
import time
from multiprocessing.context import BaseContext

import pytest

from mimkd_ray.data.direct_queue import AT_ONCE, DirectQueue, direct_context

pytestmark = pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="processes are not forked here")


@pytest.fixture
def context() -> BaseContext:
    found = direct_context()
    assert found is not None
    return found


def test_small_messages_need_no_thread(context: BaseContext) -> None:
    made = context.Queue()
    assert isinstance(made, DirectQueue)
    before = threading.active_count()
    for number in range(10):
        made.put(number)
    assert threading.active_count() == before
    assert [made.get(timeout=5) for _ in range(10)] == list(range(10))
    with pytest.raises(queue.Empty):
        made.get(timeout=0.01)


def _send(made: DirectQueue, first: int, sizes: list[int]) -> None:
    for number, size in enumerate(sizes, start=first):
        made.put((number, b"x" * size))


def test_several_processes_send_small_and_large_ones(context: BaseContext) -> None:
    """In the order of each sender, whole."""
    made = context.Queue()
    sizes = [1, AT_ONCE - 200, 10, AT_ONCE * 40, 5, AT_ONCE + 1, 7] * 5
    senders = [context.Process(target=_send, args=(made, 1000 * k, sizes)) for k in range(4)]  # type: ignore[attr-defined]
    for sender in senders:
        sender.start()
    got = [made.get(timeout=30) for _ in range(4 * len(sizes))]
    for sender in senders:
        sender.join()
    for k in range(4):
        mine = [(number % 1000, len(content)) for number, content in got if number // 1000 == k]
        assert mine == list(enumerate(sizes))


def test_nobody_reads_and_put_returns_all_the_same(context: BaseContext) -> None:
    """More than a pipe holds: the rest waits in the thread, as in any queue."""
    made = context.Queue()
    count = 3 * 2**20 // 1000
    began = time.monotonic()
    for number in range(count):
        made.put((number, b"x" * 1000))
    assert time.monotonic() - began < 20, "it would have waited for ever"
    assert [made.get(timeout=5)[0] for _ in range(count)] == list(range(count))
    made.close()
    made.join_thread()


def test_the_default_context_is_left_as_it_is(context: BaseContext) -> None:
    assert not isinstance(multiprocessing.get_context("fork").Queue(), DirectQueue)
