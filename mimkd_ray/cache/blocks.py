"""Row groups of features in the block store that the images lie in, too: one row group is one row of a block.

Of a cache on a local disk the store keeps only that a row group was verified, and rows are read in place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mimkd_ray.cache.manifest import FeatureBlock
from mimkd_ray.data.store import BlockStore
from mimkd_ray.data.stored_block import ChangedFileError, Identity, StoredBlock

WHOLE = 4
"""From a quarter of a group's rows on, all of them are read at once."""

Load = Callable[[], bytes]
"""Fetches and verifies the bytes of a row group."""


def load_block(load: Load, place: tuple[Path, int] | None) -> StoredBlock:
    """Load a row group for the store: its bytes or, for a `place` (local file, offset), where it was verified."""
    if place is None:
        return StoredBlock.of([load()], np.zeros(1, dtype=np.int64))
    path, offset = place
    identity = Identity.of(os.stat(path)) if path.exists() else None  # from before it is read: what is verified is this
    length = len(load())
    offsets, lengths, labels = (np.array([value], dtype=np.int64) for value in (offset, length, 0))
    return StoredBlock(offsets, lengths, labels, path=str(path), identity=identity)


class OpenGroup:
    """The rows of a row group, from an open file or from memory."""

    def __init__(self, block: StoredBlock, places: FeatureBlock, row_bytes: int) -> None:
        """Raises ChangedFileError for a file that is gone, cut short, or not the one that was verified."""
        self.row_bytes, self.rows = row_bytes, places.rows
        self.file = -1
        self.data = block.data
        start = int(block.offsets[0])
        self.values_at = start + places.values_at
        if block.data is None:
            self.file = block.open().detach()
        self.ids_N = np.frombuffer(self._read(start + places.ids_at, 8 * places.rows), np.int64)

    def take(self, rows: np.ndarray, out: np.ndarray, places: Sequence[int] | np.ndarray) -> None:
        """Copy rows (numbers in the group) to `places` of `out` (B, row_bytes). Raises ChangedFileError."""
        if self.data is not None or WHOLE * len(rows) >= self.rows:
            values = np.frombuffer(self._read(self.values_at, self.rows * self.row_bytes), np.uint8)
            out[places] = values.reshape(self.rows, self.row_bytes)[rows]
            return
        for row, place in zip(rows.tolist(), places, strict=True):
            if os.preadv(self.file, [out[place]], self.values_at + row * self.row_bytes) != self.row_bytes:
                raise ChangedFileError("the file of a row group is cut short")

    def close(self) -> None:
        """Close the file."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def _read(self, offset: int, length: int) -> bytes | memoryview:
        if self.data is not None:
            return memoryview(self.data)[offset : offset + length]
        data = os.pread(self.file, length, offset)
        if len(data) != length:
            raise ChangedFileError("the file of a row group is cut short")
        return data


def open_group(
    store: BlockStore | None, places: FeatureBlock, row_bytes: int, load: Load, place: tuple[Path, int] | None
) -> OpenGroup:
    """Open a row group: from the store, which `load` fills once for all processes of the node, or from memory."""
    if store is None:
        return OpenGroup(load_block(load, None), places, row_bytes)
    key = block_key(places)
    try:
        return OpenGroup(store.get(key, lambda: load_block(load, place)), places, row_bytes)
    except ChangedFileError:
        store.discard(key)  # verified as another file than the one that is there now
        return OpenGroup(load_block(load, None), places, row_bytes)


def block_key(places: FeatureBlock) -> str:
    """Return the name of a row group in the store."""
    return f"features {places.sha256}"
