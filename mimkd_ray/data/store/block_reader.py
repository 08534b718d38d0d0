"""Reading of single rows from blocks, in the store or not.

Each process caches the blocks that it used last (`CACHE_BYTES`): the places of their rows or, without a store, the rows
themselves. It also keeps the files that it used last mapped (`MAPPED_FILES`).
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections import OrderedDict

from mimkd_ray.data.store.block_store import BlockStore, Load
from mimkd_ray.data.store.stored_block import ChangedFileError, Identity, StoredBlock
from mimkd_ray.errors import DamagedDataError

CACHE_BYTES = 256 * 2**20  # of blocks that a process caches
MAPPED_FILES = 256  # each of which takes a file descriptor
TOUCH_S = 1.0  # seconds between two marks in the store that a block is in use: 5 us of path, system call and journal
TRIES = 3  # to read a row from a file that changes


class BlockReader:
    """A reader of the rows of a batch; each block is looked up once for all of its rows."""

    def __init__(self, store: BlockStore | None) -> None:
        self.store = store
        self._open: dict[str, tuple[StoredBlock, memoryview]] = {}

    def row(self, key: str, load: Load, row: int, size: int = 0) -> tuple[memoryview, int]:
        """Return the encoded image and the label of a row of block `key`, which `load()` makes if it is missing, from
        `size` bytes of storage if that is known.

        The image is a view of the cached or mapped bytes, without a copy. Raises the errors of `load`, and
        DamagedDataError for a file that keeps changing.
        """
        found = self._open.get(key)
        if found is None:
            found = self._open[key] = self._find(key, load, size)
        block, images = found
        where, label = block.row(row)
        return images[where], label

    def _find(self, key: str, load: Load, size: int) -> tuple[StoredBlock, memoryview]:
        for _ in range(TRIES):
            block = read_block(self.store, key, load, size)
            try:
                return block, block.images(_kept().mapped)
            except ChangedFileError as error:
                changed = error
            # Removed to make room, or rewritten: the present content is verified again.
            forget(self.store, key)
        raise DamagedDataError(f"{changed}, {TRIES} times in a row: leave the data alone while they are trained on")


def forget(store: BlockStore | None, key: str) -> None:
    """Drop block `key` here and in the store: it is loaded, and verified, when it is needed again."""
    _kept().drop(key)
    if store is not None:
        store.discard(key)


def read_block(store: BlockStore | None, key: str, load: Load, size: int = 0) -> StoredBlock:
    """Return block `key`: from this process's memory, from the store, or from `load()`."""
    kept = _kept()
    block = kept.find(key)
    if block is None:
        block = load() if store is None else store.get(key, load, size)
        kept.keep(key, block)
    elif store is not None and kept.note_use(key):
        store.touch(key)
    return block


class _KeptBlocks:
    """The blocks that this process used last."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.bytes = 0
        self._lock = threading.Lock()
        self._blocks: OrderedDict[str, StoredBlock] = OrderedDict()
        self._noted: dict[str, float] = {}  # last time at which the store was told that a block is in use
        self._mapped: OrderedDict[tuple[str, Identity | None], memoryview] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, key: str) -> StoredBlock | None:
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
            return self._blocks.get(key)

    def note_use(self, key: str) -> bool:
        """Return whether the store should be told that the block is in use: not if it was told within TOUCH_S."""
        now = time.monotonic()
        with self._lock:
            if now - self._noted.get(key, 0.0) <= TOUCH_S:
                return False
            self._noted[key] = now
            return True

    def keep(self, key: str, block: StoredBlock) -> None:
        with self._lock:
            if key in self._blocks:
                return
            self._blocks[key] = block
            self._noted[key] = time.monotonic()
            self.bytes += block.held_bytes
            while self.bytes > CACHE_BYTES and len(self._blocks) > 1:
                oldest, dropped = self._blocks.popitem(last=False)
                self._noted.pop(oldest, None)
                self.bytes -= dropped.held_bytes

    def drop(self, key: str) -> None:
        with self._lock:
            block = self._blocks.pop(key, None)
            self._noted.pop(key, None)
            if block is not None:
                self.bytes -= block.held_bytes
                self._mapped.pop((block.path, block.identity), None)

    def mapped(self, path: str, identity: Identity | None) -> memoryview:
        """Return the content of a file; the mapping lives as long as it is used, even if the file is deleted. One in
        place must have this identity."""
        name = path, identity
        with self._lock:
            if name not in self._mapped:
                try:
                    with open(path, "rb") as file:
                        if identity is not None and Identity.of(os.fstat(file.fileno())) != identity:
                            raise ChangedFileError(f"{path} has been written again")
                        self._mapped[name] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                except (FileNotFoundError, ValueError) as error:  # ValueError: it is empty
                    raise ChangedFileError(f"{path} is gone, or empty") from error
            self._mapped.move_to_end(name)
            while len(self._mapped) > MAPPED_FILES:
                self._mapped.popitem(last=False)
            return self._mapped[name]


_blocks = _KeptBlocks()


def _kept() -> _KeptBlocks:
    """Return this process's blocks; a forked child gets new ones, because its parent may have held their lock."""
    global _blocks
    if _blocks.pid != os.getpid():
        _blocks = _KeptBlocks()
    return _blocks
