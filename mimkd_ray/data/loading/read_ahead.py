"""Fetching of the blocks of coming batches into the block store, before decoders need them.

One process per training worker (a thread if the worker decodes in its own process) walks through the worker's batches
in order, with several fetches in flight, and stays a bounded number of blocks ahead of the training loop. Read-ahead is
only an optimisation: a block that is not there yet, or could not be fetched, is fetched by the decoder that needs it,
which then fails with the object's name in the batch concerned.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np

from mimkd_ray.data.loading.batches import FeatureSource
from mimkd_ray.data.loading.cpu_quota import usable_cores
from mimkd_ray.data.loading.start_method import helper_context
from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.data.sources.source import Source
from mimkd_ray.data.store.block_store import BlockStore

logger = logging.getLogger(__name__)

FETCHES = 8  # in flight at a time over a network: 260 requests a second at 30 ms each
CORES_A_FETCH = 16  # local disk: a thread verifies 1 GB/s, as much as this many decoders read, and takes their cores
LEAST_AHEAD = 8  # least blocks per lane, for smaller windows
FULL_AHEAD = 4  # batches per lane, for an order without windows, where each row may be in another block
LEAST_BATCHES = 64  # least batches that it may look ahead of the loop
POLL_S = 0.03  # seconds between two checks of the loop's progress
PARENT_POLL_S = 0.5  # seconds between two checks that the training process lives


class WithFeatures:
    """Images and their cached features as one source to read ahead, with place `view * rows + position`."""

    def __init__(self, source: Source, features: FeatureSource, views: int) -> None:
        self.source, self.features = source, features
        self.store: BlockStore | None = features.store
        self.blocks: Blocks = Blocks.of(np.tile(source.blocks.counts, views))
        self.block_bytes: int = source.block_bytes + features.block_bytes(source.blocks)
        self.distant: bool = source.distant or features.distant

    def places(self, positions: np.ndarray, view: int) -> np.ndarray:
        """Return the places of the images at `positions` in view number `view`."""
        return positions + view * self.source.num_rows

    def fetch(self, block: int) -> bool:
        """Fetch a block of images (if they have a store) and its features in a view."""
        view, number = divmod(block, self.source.blocks.num_blocks)
        if self.source.store is not None and not self.source.fetch(number):
            return False
        return self.features.fetch(view, self.source.blocks.start(number), self.source.blocks.start(number + 1))


AheadSource = Source | WithFeatures
"""What is read ahead: images, or images together with cached features."""


class Distance(NamedTuple):
    """Distance of reading ahead: blocks fetched before their batch's turn, and blocks in use at a time."""

    ahead: int
    in_use: int


def distance(
    source: AheadSource, read_ahead: int, *, window: int, lanes: int, lane_batch: int, local_workers: int
) -> Distance | None:
    """Return the distance by which one worker may read ahead for all its `lanes` together; None: no read-ahead.

    `read_ahead` is in blocks per lane; -1 means another window of them. It is limited to what the store can hold beside
    the blocks in use, divided among the workers of this node.
    """
    if source.store is None or read_ahead == 0:
        return None
    automatic = max(LEAST_AHEAD, window) if window else FULL_AHEAD * lane_batch
    wanted = lanes * (automatic if read_ahead < 0 else read_ahead)
    room = source.store.max_bytes // (max(1, source.block_bytes) * local_workers)
    in_use = min(lanes * window, room) if window else room // 2
    return Distance(max(1, min(wanted, room - in_use)), in_use)


class ReadAhead:
    """Read-ahead for `batches`, the positions of one batch after the other, until `close`."""

    def __init__(self, source: AheadSource, batches: Iterable[np.ndarray], far: Distance, own_process: bool) -> None:
        self._consumed: Any = multiprocessing.Value("q", 0, lock=False)
        self._stop = threading.Event()
        arguments = (source, batches, far, self._consumed)
        self.process: BaseProcess | None = None
        if own_process:
            self.process = helper_context().Process(  # type: ignore[attr-defined]
                target=_in_process, args=(*arguments, os.getpid()), name="read-ahead", daemon=True
            )
            self.process.start()
        else:
            thread = threading.Thread(target=_walk, args=(*arguments, self._stop.wait), name="read-ahead", daemon=True)
            thread.start()

    def consumed(self, batches: int) -> None:
        """Report the number of batches that the loop has taken."""
        self._consumed.value = batches

    def close(self) -> None:
        """Stop at once; fetches in flight in a thread finish first."""
        self._stop.set()
        if self.process is not None:
            self.process.kill()  # safe at any moment: a block is renamed into place only when it is whole
            self.process.join()
            self.process.close()
            self.process = None


def _in_process(source: AheadSource, batches: Iterable[np.ndarray], far: Distance, consumed: Any, parent: int) -> None:
    # Ctrl-C and SIGTERM reach the whole group; the training process decides, and kills this process at the end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _walk(source, batches, far, consumed, time.sleep)


def _walk(
    source: AheadSource, batches: Iterable[np.ndarray], far: Distance, consumed: Any, wait: Callable[[float], object]
) -> None:
    """Fetch block after block; `wait(seconds)` returns something true to stop."""
    full = threading.Event()
    known: OrderedDict[int, None] = OrderedDict()  # recently requested blocks, which the store still holds
    pending: deque[int] = deque()  # for each block fetched ahead: the number of the first batch that needs it

    def fetch(block: int) -> None:
        try:
            if not source.fetch(block):
                full.set()  # a block that cannot be kept would be read twice
        except Exception as error:
            # The decoder that needs the block gets the same error, and its batch names it.
            logger.debug("reading ahead, block %d: %s", block, error)

    def may_go_on(near: Callable[[], bool]) -> bool:
        """Wait until the loop has come near; return False if there is nothing left to do."""
        while not full.is_set():
            is_near = near()
            if wait(0 if is_near else POLL_S):
                return False
            if is_near:
                return True
        return False

    def few_blocks() -> bool:
        while pending and pending[0] < consumed.value:
            pending.popleft()
        return len(pending) < far.ahead

    def few_batches() -> bool:
        return consumed.value >= least

    fetches = FETCHES if source.distant else max(1, min(FETCHES, usable_cores() // CORES_A_FETCH))
    pool = ThreadPoolExecutor(fetches, thread_name_prefix="fetch")
    least = 0.0
    rows = (far.ahead + far.in_use) * source.blocks.num_rows / max(1, source.blocks.num_blocks)
    for number, positions in enumerate(batches):
        # If all blocks are known already, the number of batches must be limited instead.
        least = number - max(LEAST_BATCHES, 2 * rows / len(positions))
        if not may_go_on(few_batches):
            pool.shutdown(wait=False, cancel_futures=True)
            return
        for block in dict.fromkeys(source.blocks.locate(positions)[0].tolist()):
            if block not in known:
                if not may_go_on(few_blocks):
                    pool.shutdown(wait=False, cancel_futures=True)
                    return
                pending.append(number)
                pool.submit(fetch, block)
            known[block] = None
            known.move_to_end(block)
            if len(known) > far.ahead + far.in_use:
                known.popitem(last=False)
    pool.shutdown(wait=True)
