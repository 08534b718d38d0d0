"""One row group of a Parquet file: read by one request, verified if its digest is known, and its rows located.

Arrow decodes the row group. If its images are stored uncompressed in the file (as prepared sets and most image sets
are) and the file is on a local disk, the images stay there and only their places are kept.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from mimkd_ray import storage
from mimkd_ray.data.sources.columns import NO_LABEL, Columns, label_array
from mimkd_ray.data.sources.folders import SUFFIXES
from mimkd_ray.data.sources.shard_manifest import Block
from mimkd_ray.data.store.stored_block import Identity, StoredBlock
from mimkd_ray.errors import DamagedDataError, UserError
from mimkd_ray.remote_file import RangeFile

KEPT_FOOTERS = 64  # parsed, per process
HEAD_BYTES = 64  # first bytes of an image, by which it is searched
LARGE_BYTES, STREAM_ROWS = 256 << 20, 256
"""Of a row group that is read a few rows at a time: some files have one of all their images."""
STREAM_BYTES = 8 << 20  # of a request then
MAX_GAP = 1 << 16  # bytes of other columns between those needed: reading them is cheaper than another request
UNCOMPRESSED = "UNCOMPRESSED"  # as pyarrow calls it


def read_row_group(
    url: str,
    size: int,
    group: int,
    columns: Columns,
    listed: Block | None,
    first_id: int,
    in_place: bool,
    names: Sequence[str] | None = None,
) -> StoredBlock:
    """Return row group `group` of the file at `url` (`size` bytes). With `in_place`, its images stay in the file if
    they are uncompressed there.

    `names` are the classes of labels that are text. An image without bytes is the file at its path, beside the Parquet
    file. `listed` is the row group in the manifest of a prepared set: its bytes must have that digest, and its ids
    count from `first_id` on. Raises DamagedDataError for what is gone, cut short, changed or unreadable, UserError for
    labels that are no class, StorageError.
    """
    import pyarrow as pa

    try:
        return _read(url, size, group, columns, listed, first_id, in_place, names)
    except FileNotFoundError as error:
        raise DamagedDataError(f"{url} is gone: it was there when the set was opened; put it back") from error
    except storage.StorageError:
        raise  # not caused by the file's content
    except (pa.ArrowInvalid, OSError) as error:
        raise DamagedDataError(f"{url}: row group {group} cannot be read ({error}); copy the file again") from error


def _read(
    url: str,
    size: int,
    group: int,
    columns: Columns,
    listed: Block | None,
    first_id: int,
    in_place: bool,
    names: Sequence[str] | None,
) -> StoredBlock:
    import pyarrow.parquet as pq

    metadata = read_metadata(url, size)
    of_label = [columns.label] if columns.label else []
    numbers = of_label if listed is None else [*of_label, "id"]
    place = Place(url, size, group)
    chunks = {metadata.row_group(group).column(i).path_in_schema: i for i in range(metadata.num_columns)}
    spans = [chunk_span(metadata.row_group(group).column(chunks[name])) for name in (columns.bytes_path, *numbers)]
    start, stop = min(first for first, _ in spans), max(end for _, end in spans)
    images = metadata.row_group(group).column(chunks[columns.bytes_path])
    stay, apart = in_place and images.compression == UNCOMPRESSED, stop - start > sum(b - a for a, b in spans) + MAX_GAP
    if listed is not None:
        start, stop = listed.offset, listed.offset + listed.length
    elif images.total_uncompressed_size > LARGE_BYTES or (apart and stay):
        return _streamed(place, columns, names, metadata, start if stay else None)
    elif apart:
        with open_parquet(url, size, metadata) as file:
            wanted = [columns.bytes_path, *of_label]
            return _decoded(file.read_row_group(group, columns=wanted, use_threads=False), place, columns, names)
    # Before the bytes: if the file is written again in between, its identity is another one, and it is read again.
    identity = Identity.of(os.stat(storage.local_path(url))) if in_place else None
    data = _range(url, group, start, stop - start, listed)
    with pq.ParquetFile(_Part(data, start, size), metadata=metadata) as file:
        table = file.read_row_group(group, columns=[columns.bytes_path, *numbers], use_threads=False)
    if listed is not None:
        _check_ids(label_array(table.column("id"), url), url, group, first_id)
    block = _decoded(table, place, columns, names)
    places = find_images(data, block) if stay else None
    if places is None:
        return block
    path = os.path.abspath(storage.local_path(url))
    return StoredBlock(places + start, block.lengths, block.labels, path=path, identity=identity)


def _range(url: str, group: int, offset: int, length: int, listed: Block | None) -> bytes:
    """Return these bytes of the file, with their length checked and, if known, their digest."""
    data = storage.read_range(url, offset, length)
    if len(data) < length:
        raise DamagedDataError(
            f"{url} is cut short: {len(data):,} of the {length:,} bytes of row group {group} at byte "
            f"{offset:,} are there; copy the file again"
        )
    digest = hashlib.sha256(data).hexdigest() if listed is not None else ""
    if listed is not None and digest != listed.sha256:
        raise DamagedDataError(
            f"{url}: row group {group} is damaged: its {length:,} bytes have the sha256 {digest[:12]}..., and "
            f"the manifest says {listed.sha256[:12]}...; copy the file again"
        )
    return data


def _check_ids(ids: np.ndarray, url: str, group: int, first_id: int) -> None:
    if not np.array_equal(ids, np.arange(first_id, first_id + len(ids))):
        raise DamagedDataError(
            f"{url}: row group {group} has the ids {ids[0]:,} to {ids[-1]:,}, and its place in the manifest says "
            f"{first_id:,} to {first_id + len(ids) - 1:,}: the set is mixed up; copy the prepared set again as "
            "a whole, or prepare it anew"
        )


class Place(NamedTuple):
    """A row group of a file of `size` bytes."""

    url: str
    size: int
    group: int


def _streamed(
    place: Place, columns: Columns, names: Sequence[str] | None, metadata: Any, start: int | None
) -> StoredBlock:
    """Return a row group that is not read as a whole; memory holds STREAM_ROWS of its images at a time. They stay in
    their file if they are there uncompressed, from byte ``start`` on; else they are in a temporary one, which the store
    copies."""
    import pyarrow as pa

    path = os.path.abspath(storage.local_path(place.url))
    parts: list[StoredBlock] = []
    row = written = 0
    with ExitStack() as stack:
        identity: Identity | None = None
        source: bytes | mmap.mmap = b""
        kept = None
        if start is None:
            kept = stack.enter_context(tempfile.TemporaryFile())
        else:
            file = stack.enter_context(open(path, "rb"))
            identity = Identity.of(os.fstat(file.fileno()))
            source = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        wanted = [columns.bytes_path, *([columns.label] if columns.label else [])]
        parquet = stack.enter_context(open_parquet(place.url, place.size, metadata, STREAM_BYTES))
        options = {"batch_size": STREAM_ROWS, "row_groups": [place.group], "columns": wanted, "use_threads": False}
        for batch in parquet.iter_batches(**options):
            block = _decoded(pa.Table.from_batches([batch]), place, columns, names, row)
            row += len(block.labels)
            if kept is None:
                places = find_images(source, block, start or 0)
                if places is None:
                    return _streamed(place, columns, names, metadata, None)
                start = int(places[-1] + block.lengths[-1])
            else:
                places = block.offsets - block.offsets[0] + written
                images = memoryview(block.data or b"")[int(block.offsets[0]) : block.end]
                with storage.explained(tempfile.gettempdir(), "write to"):
                    written += kept.write(images)
            parts.append(replace(block, offsets=places, data=None))
        offsets, lengths, labels = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("offsets", "lengths", "labels")
        )
        if kept is None:
            return StoredBlock(offsets, lengths, labels, path=path, identity=identity)
        kept.flush()
        data = memoryview(mmap.mmap(kept.fileno(), 0, access=mmap.ACCESS_READ)) if written else b""
        return StoredBlock(offsets, lengths, labels, data=data)


def _decoded(table: Any, place: Place, columns: Columns, names: Sequence[str] | None, first: int = 0) -> StoredBlock:
    """Return the images that Arrow has decoded, in its memory; a missing one is empty, and counts as damaged when it is
    viewed. ``first`` is the table's first row in the row group."""
    import pyarrow as pa

    (column,) = table.select([columns.image]).flatten().columns  # of a struct its only field that was read
    images = column.cast(pa.large_binary()).combine_chunks()
    labels = np.full(table.num_rows, NO_LABEL, dtype=np.int64)
    if columns.label:
        where = f"{place.url} (row group {place.group})"
        labels = label_array(table.column(columns.label), where, names, columns.strict)
    if images.null_count:
        if columns.field and columns.has_path:
            with open_parquet(place.url, place.size, read_metadata(place.url, place.size)) as file:
                paths = file.read_row_group(place.group, columns=[f"{columns.image}.path"], use_threads=False)
            (named,) = paths.slice(first, table.num_rows).flatten().columns
            rows = zip(images.to_pylist(), named.to_pylist(), strict=True)
            return StoredBlock.of([image or read_beside(place.url, path) for image, path in rows], labels)
        images = images.fill_null(b"")
    _, offsets, values = images.buffers()
    ends = np.frombuffer(offsets, np.int64)[images.offset : images.offset + len(images) + 1]
    data = memoryview(values).cast("B") if values is not None else b""
    return StoredBlock(ends[:-1], np.diff(ends), labels, data=data)


def read_beside(url: str, path: str | None) -> bytes:
    """Return the image at `path`, which a Parquet file names instead of holding it; b"" for none.

    The path is relative to the file's folder; of a local file it may be absolute.
    """
    if not path or not path.lower().endswith(SUFFIXES) or "://" in path:
        return b""
    try:
        if path.startswith("/"):
            return b"" if storage.is_remote(url) else storage.read_bytes(path)
        return storage.read_bytes(storage.join(url.rpartition("/")[0], path))
    except FileNotFoundError:
        return b""


def find_images(data: bytes | mmap.mmap, block: StoredBlock, at: int = 0) -> np.ndarray | None:
    """Return the places of the images of `block` in `data` (int64), in their order from `at` on; None if one is not
    found.

    `data` is (or has) the row group that `block` was decoded from. Matches are compared byte by byte, so the page
    layout of Parquet does not matter. 40 us for an image of 100 kB.
    """
    images, found = memoryview(block.data or b""), []
    for offset, length in zip(block.offsets.tolist(), block.lengths.tolist(), strict=True):
        image = images[offset : offset + length]
        # `find` preprocesses its search string: 300 us for a whole image.
        head = image[:HEAD_BYTES]
        at = data.find(head, at)
        while at >= 0 and data[at : at + length] != image:
            at = data.find(head, at + 1)
        if at < 0:
            return None
        found.append(at)
        at += length
    return np.array(found, dtype=np.int64)


class _Part(RangeFile):
    """A part of a file in memory, at its own offset; reads outside it are errors."""

    def __init__(self, data: bytes, offset: int, size: int) -> None:
        super().__init__(size)
        self._data, self._offset = data, offset

    def fetch(self, start: int, stop: int) -> bytes:
        if start < self._offset or stop > self._offset + len(self._data):
            raise OSError(f"bytes {start} to {stop} are outside the row group")
        return self._data[start - self._offset : stop - self._offset]


@lru_cache(maxsize=KEPT_FOOTERS)
def read_metadata(url: str, size: int) -> Any:
    """Return the file's footer as pyarrow's metadata; this process caches the last ones."""
    with open_parquet(url, size) as file:
        return file.metadata


def open_parquet(url: str, size: int, metadata: Any = None, buffer: int = 0) -> Any:
    """Open a Parquet file of `size` bytes; with a `buffer` to read row groups by so many bytes at a time.

    Raises UserError for a file that cannot be read or is not Parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if storage.is_remote(url):
            # pre_buffer joins the ranges of a row group into few requests.
            how = {"buffer_size": buffer, "pre_buffer": not buffer}
            return pq.ParquetFile(storage.open_file(url, size), metadata=metadata, **how)
        # Plain reads: a memory map of a truncated file kills the process instead of raising.
        return pq.ParquetFile(str(storage.local_path(url)), metadata=metadata, buffer_size=buffer, pre_buffer=False)
    except PermissionError as error:
        raise UserError(f"cannot read {url}: {error}; check the permissions") from error
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and (error.errno is not None or isinstance(error, storage.StorageError)):
            raise  # not caused by the file's content
        reason = " ".join(str(error).split())
        raise UserError(f"{url} ({size:,} bytes) is not a readable Parquet file: {reason}; copy it again") from error


def chunk_span(column: Any) -> tuple[int, int]:
    """Return (first byte, byte after the last one) of a column chunk."""
    start = column.data_page_offset
    if column.dictionary_page_offset is not None:
        start = min(start, column.dictionary_page_offset)
    return start, start + column.total_compressed_size
