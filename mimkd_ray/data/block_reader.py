"""Rows out of blocks, one at a time, wherever the blocks are kept.

Each process keeps what it knows of the blocks that it used last (`CACHE_BYTES`): where rows lie or, without a store,
the rows themselves.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from types import TracebackType

from mimkd_ray.data.store import BlockStore, Load
from mimkd_ray.data.stored_block import ChangedFileError, OpenBlock, StoredBlock
from mimkd_ray.errors import DamagedDataError

CACHE_BYTES = 256 * 2**20  # of blocks that a process keeps
TRIES = 3  # to read a row from a file that changes


class BlockReader:
    """A with-block in which rows are read; the file of a block is opened once, and closed at the end."""

    def __init__(self, store: BlockStore | None) -> None:
        self.store = store
        self._open: dict[str, OpenBlock] = {}

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for block in self._open.values():
            block.close()

    def row(self, key: str, load: Load, row: int) -> tuple[bytes, int]:
        """Return the encoded image and the label of a row of block `key`, which `load()` makes if need be. 3 us.

        Raises what `load` does, and DamagedDataError for a file that is written again and again.
        """
        for _ in range(TRIES):
            try:
                block = self._open.get(key)
                if block is None:
                    block = self._open[key] = read_block(self.store, key, load).open()
                return block.row(row)
            except ChangedFileError as error:
                changed = error
            # Removed to make room, or written again: what is there now is verified anew.
            if key in self._open:
                self._open.pop(key).close()
            _kept().drop(key)
            if self.store is not None:
                self.store.discard(key)
        raise DamagedDataError(f"{changed}, {TRIES} times in a row: leave the data alone while they are trained on")


def read_block(store: BlockStore | None, key: str, load: Load) -> StoredBlock:
    """Return block `key`: from this process's memory, from the store, or from `load()`."""
    kept = _kept()
    block = kept.find(key)
    if block is None:
        block = load() if store is None else store.get(key, load)
        kept.keep(key, block)
    elif store is not None:
        store.touch(key)
    return block


class _KeptBlocks:
    """The blocks that this process used last."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.bytes = 0
        self._lock = threading.Lock()
        self._blocks: OrderedDict[str, StoredBlock] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, key: str) -> StoredBlock | None:
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
            return self._blocks.get(key)

    def keep(self, key: str, block: StoredBlock) -> None:
        with self._lock:
            if key in self._blocks:
                return
            self._blocks[key] = block
            self.bytes += block.held_bytes
            while self.bytes > CACHE_BYTES and len(self._blocks) > 1:
                self.bytes -= self._blocks.popitem(last=False)[1].held_bytes

    def drop(self, key: str) -> None:
        with self._lock:
            block = self._blocks.pop(key, None)
            self.bytes -= block.held_bytes if block else 0


_blocks = _KeptBlocks()


def _kept() -> _KeptBlocks:
    """Return this process's blocks: a forked child must not wait for a lock that its parent held."""
    global _blocks
    if _blocks.pid != os.getpid():
        _blocks = _KeptBlocks()
    return _blocks
