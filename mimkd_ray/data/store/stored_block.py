"""One block kept on this node: encoded images in a file, and the place of each.

The images are those of the bytes that were fetched and verified. They are in a file of the store, followed by the
index; or they stay in place, in the data set's own file on a local disk, and the store's file holds only the index.
Files are mapped: reading an image needs no system call and no copy, and processes share the pages.

    file of the store:  images | offsets, lengths, labels (int64) | path of a file in place | trailer, checksum
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

_MAGIC = b"mimkd\0b1"
_TRAILER = struct.Struct("<8s6q")  # magic, rows, bytes of images, bytes of the path, identity
_CHECKSUM = struct.Struct("<I")  # after the trailer; covers everything except the images
_END_BYTES = _TRAILER.size + _CHECKSUM.size
_NUMBERS = 3  # kept for each row


class ChangedFileError(Exception):
    """A block's file is gone or is not the one that was verified: the block must be loaded again."""


class Identity(NamedTuple):
    """Properties of a file that change when it is rewritten."""

    size: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        # A copy tool sets the time of modification as it likes; that of the last change of the file it cannot.
        return cls(status.st_size, max(status.st_mtime_ns, status.st_ctime_ns), status.st_ino)


@dataclass(frozen=True, eq=False)
class StoredBlock:
    """The rows of a block: `lengths` bytes at `offsets` (int64) of `data`, or of the file at `path`, and `labels`.

    With an `identity` the file belongs to the data set and must still be the one that was verified.
    """

    offsets: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    data: bytes | memoryview | None = None
    path: str = ""
    identity: Identity | None = None

    @classmethod
    def of(cls, images: Sequence[bytes], labels: np.ndarray) -> StoredBlock:
        """Return a block of these images, in memory."""
        lengths = np.array([len(image) for image in images], dtype=np.int64)
        return cls(np.cumsum(lengths) - lengths, lengths, labels, data=b"".join(images))

    @property
    def held_bytes(self) -> int:
        """Memory of the block in bytes."""
        return len(self.data or b"") + _NUMBERS * self.labels.nbytes

    @cached_property
    def _numbers(self) -> tuple[memoryview, memoryview, memoryview]:
        """Offsets, lengths and labels as memoryviews, whose items are Python numbers and not NumPy scalars."""
        offsets, lengths, labels = (
            np.ascontiguousarray(each, dtype=np.int64).data for each in (self.offsets, self.lengths, self.labels)
        )
        return offsets, lengths, labels

    def row(self, row: int) -> tuple[slice, int]:
        """Return the place of a row's image in `images`, and its label."""
        offsets, lengths, labels = self._numbers
        start = offsets[row]
        return slice(start, start + lengths[row]), labels[row]

    @cached_property
    def end(self) -> int:
        """Place after the last image; used for every batch."""
        return int((self.offsets + self.lengths).max())

    def images(self, mapped: Callable[[str, Identity | None], memoryview]) -> memoryview:
        """Return the bytes that `offsets` refer to; `mapped` returns those of a file, which
        must be the one of this identity. Raises ChangedFileError.

        A file in place is checked first. If it is truncated between the check and the use of a row, the system kills
        the process; the next start finds the file damaged.
        """
        if self.data is not None:
            return memoryview(self.data)
        if self.identity is not None:
            try:
                found = Identity.of(os.stat(self.path))
            except FileNotFoundError as error:
                raise ChangedFileError(f"{self.path} is gone") from error
            if found != self.identity:
                raise ChangedFileError(f"{self.path} has been written again")
        view = mapped(self.path, self.identity)
        if len(view) < self.end:
            raise ChangedFileError(f"{self.path} is cut short: it has {len(view):,} bytes")
        return view

    def write(self, path: Path, durable: bool) -> None:
        """Write the file of the store; with `durable`, wait until a power cut cannot undo it."""
        with open(path, "wb") as out:
            out.write(self.data or b"")
            out.write(self._index())
            if durable:
                out.flush()
                os.fsync(out.fileno())

    def file_bytes(self) -> int:
        """Return the size of the file of the store."""
        return len(self.data or b"") + _NUMBERS * self.labels.nbytes + len(os.fsencode(self.path)) + _END_BYTES

    def at(self, path: Path) -> StoredBlock:
        """Return the block in the form that `read_stored` returns, after it has been written to `path`."""
        return self if self.data is None else replace(self, data=None, path=str(path))

    def _index(self) -> bytes:
        path = os.fsencode(self.path)
        index = np.stack([self.offsets, self.lengths, self.labels]).astype("<i8").tobytes() + path
        identity = self.identity or (0, 0, 0)
        index += _TRAILER.pack(_MAGIC, len(self.labels), len(self.data or b""), len(path), *identity)
        return index + _CHECKSUM.pack(zlib.crc32(index))


def read_stored(path: Path) -> StoredBlock:
    """Return the block whose file of the store is at `path`; its images stay there, or in place.

    Raises FileNotFoundError if there is none, and ValueError for a damaged file. Makes two reads, whatever the images'
    size.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - _END_BYTES))
        end = file.read(_END_BYTES)
        if len(end) < _END_BYTES:
            raise ValueError(f"{size} bytes are too few")
        magic, rows, data_bytes, path_bytes, *identity = _TRAILER.unpack_from(end)
        index_bytes = 8 * _NUMBERS * rows + path_bytes
        if magic != _MAGIC or min(rows, data_bytes, path_bytes) < 0 or size != data_bytes + index_bytes + _END_BYTES:
            raise ValueError("its end is not that of a block")
        file.seek(data_bytes)
        index = file.read(index_bytes)
    if zlib.crc32(end[: _TRAILER.size], zlib.crc32(index)) != _CHECKSUM.unpack_from(end, _TRAILER.size)[0]:
        raise ValueError("its index does not match its checksum")
    offsets, lengths, labels = np.frombuffer(index, "<i8", _NUMBERS * rows).reshape(_NUMBERS, rows)
    if path_bytes:
        in_place = os.fsdecode(index[-path_bytes:])
        return StoredBlock(offsets, lengths, labels, path=in_place, identity=Identity(*identity))
    return StoredBlock(offsets, lengths, labels, path=str(path))
