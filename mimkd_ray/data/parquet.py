"""Image data sets in Parquet: `image: struct<bytes, path>` (Hugging Face) or binary, `label: int64`.

A file is a shard, a row group is a block. Opening reads footers only. Reading decodes the row groups that
hold the rows asked for; a process keeps the last ones (`CACHE_BYTES`), which serves orders whose window fits.
Rows asked for one by one from far more blocks than that are slow, because each costs a row group.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from mimkd_ray import storage
from mimkd_ray.data.blocks import Blocks
from mimkd_ray.data.source import Row, digest_of
from mimkd_ray.errors import DamagedDataError, UserError

CACHE_BYTES = 256 * 2**20  # decoded row groups, per process
OPEN_FILES = 32  # parsed footers and handles, per process
FOOTER_THREADS = 16


class _Footer(NamedTuple):
    row_groups: tuple[int, ...]  # rows of each
    label_range: tuple[int, int] | None  # None: no statistics
    classes: tuple[str, ...]  # () if the file does not name them
    image_column: str  # "image.bytes", or "image" for a plain binary column


class ParquetSource:
    """The rows of Parquet files, one file behind the other in the order given; id = row number = position."""

    def __init__(self, files: dict[str, int]) -> None:
        """`files` maps each URL to its size in bytes, as from `storage.list_sizes`.

        Raises UserError for a file that is not Parquet, lacks columns, or disagrees with the others about
        classes.
        """
        self.files: tuple[tuple[str, int], ...] = tuple(files.items())
        with ThreadPoolExecutor(min(FOOTER_THREADS, len(self.files))) as pool:
            footers = list(pool.map(lambda file: _read_footer(*file), self.files))
        self._image_columns = tuple(f.image_column for f in footers)
        self._ranges = tuple(f.label_range for f in footers)
        row_groups = tuple(n for f in footers for n in f.row_groups)
        self.blocks: Blocks = Blocks.of(row_groups)
        # Block b is row group g of file f, (f, g) = _block_place[b].
        self._block_place = [(i, g) for i, f in enumerate(footers) for g in range(len(f.row_groups))]
        self._file_start = np.cumsum([0, *(sum(f.row_groups) for f in footers)])
        self.num_bytes = sum(size for _, size in self.files)
        self.num_rows: int = self.blocks.num_rows
        if self.num_rows == 0:
            raise UserError(f"{self.files[0][0]}: the {len(self.files)} Parquet file(s) of this split hold no rows")
        self.classes: tuple[str, ...] = self._agree_on_classes(footers)
        names = [(_base(url), size) for url, size in self.files]
        self.digest: str = digest_of("parquet", names, row_groups, self.classes)

    def labels(self) -> np.ndarray:
        """Return all labels (int64). Reads the label column of every file."""
        with ThreadPoolExecutor(min(FOOTER_THREADS, len(self.files))) as pool:
            columns = list(pool.map(lambda file: _read_labels(*file), self.files))
        return np.concatenate(columns)

    def label_range(self) -> tuple[int, int]:
        """Return the smallest and largest label, from the footers' statistics where there are any."""
        known = [r for r in self._ranges if r is not None]
        if len(known) < len(self._ranges):
            labels = self.labels()
            return int(labels.min()), int(labels.max())
        return min(low for low, _ in known), max(high for _, high in known)

    def read(self, positions: Sequence[int]) -> list[Row]:
        """Return the rows at `positions`, in order. Raises DamagedDataError for an unreadable row group."""
        blocks, insides = self.blocks.locate(positions)
        rows: dict[int, Row] = {}
        # Block by block: a row group is decoded once per call even if the cache is too small to keep it.
        for place in np.argsort(blocks, kind="stable"):
            block, position = int(blocks[place]), int(positions[place])
            file, group = self._block_place[block]
            url, size = self.files[file]
            images, labels = _row_group(url, size, group, self._image_columns[file])
            inside = int(insides[place])
            name = f"{_base(url)} row {position - int(self._file_start[file])}"
            # A missing image is an empty one: it counts as damaged when it is decoded.
            rows[int(place)] = Row(position, int(labels[inside]), images[inside].as_py() or b"", name)
        return [rows[place] for place in range(len(positions))]

    def _agree_on_classes(self, footers: list[_Footer]) -> tuple[str, ...]:
        first = footers[0].classes
        for (url, _), footer in zip(self.files, footers, strict=True):
            if footer.classes != first:
                raise UserError(
                    f"{url} names {len(footer.classes)} classes and {self.files[0][0]} names {len(first)}, "
                    "or others: the files of one split must agree; remove the file that does not belong to it"
                )
        return first or tuple(map(str, range(self.label_range()[1] + 1)))


def _base(url: str) -> str:
    return url.rpartition("/")[2]


def _open(url: str, size: int) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if storage.is_remote(url):
            # pre_buffer joins the ranges of a row group into few requests.
            return pq.ParquetFile(storage.open_file(url, size), pre_buffer=True)
        # Plain reads: a memory map of a file that is cut short kills the process instead of raising.
        return pq.ParquetFile(str(storage.local_path(url)), pre_buffer=False)
    except PermissionError as error:
        raise UserError(f"cannot read {url}: {error}; check the permissions") from error
    except pa.ArrowInvalid as error:
        raise UserError(f"{url} ({size:,} bytes) is not a readable Parquet file: {error}; copy it again") from error


def _read_footer(url: str, size: int) -> _Footer:
    with _open(url, size) as file:
        metadata = file.metadata
        schema = file.schema_arrow
        if "image" not in schema.names or "label" not in schema.names:
            raise UserError(
                f"{url}: columns 'image' and 'label' are needed, found {', '.join(schema.names) or 'none'}; "
                "rename them or convert the data set"
            )
        paths = [metadata.schema.column(i).path for i in range(len(metadata.schema))]
        if "label" not in paths:
            raise UserError(f"{url}: column 'label' must be an integer; it is {schema.field('label').type}")
        image_column = "image.bytes" if "image.bytes" in paths else "image"
        if image_column not in paths or metadata.schema.column(paths.index(image_column)).physical_type != "BYTE_ARRAY":
            raise UserError(
                f"{url}: column 'image' must be a struct with a binary field 'bytes', or binary; it is "
                f"{schema.field('image').type}"
            )
        if metadata.schema.column(paths.index("label")).physical_type not in ("INT32", "INT64"):
            raise UserError(f"{url}: column 'label' must be an integer; it is {schema.field('label').type}")
        groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
        ranges = [_statistics(group.column(paths.index("label"))) for group in groups if group.num_rows]
        known = [r for r in ranges if r is not None]
        whole = (min(r[0] for r in known), max(r[1] for r in known)) if known and len(known) == len(ranges) else None
        return _Footer(tuple(g.num_rows for g in groups), whole, _class_names(schema.metadata), image_column)


def _statistics(column: Any) -> tuple[int, int] | None:
    if not column.is_stats_set or not column.statistics.has_min_max:
        return None
    return int(column.statistics.min), int(column.statistics.max)


def _class_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...]:
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
        return tuple(map(str, names))
    except (KeyError, TypeError, ValueError):
        return ()  # the names are a courtesy of the format: numbers do as well


def _read_labels(url: str, size: int) -> np.ndarray:
    with _open(url, size) as file:
        return _label_array(file.read(columns=["label"], use_threads=False).column("label"), url)


def _label_array(column: Any, url: str) -> np.ndarray:
    if column.null_count:
        raise UserError(f"{url}: {column.null_count:,} of {len(column):,} rows have no label; remove them")
    return column.to_numpy().astype(np.int64, copy=False)


class _Cache:
    """The open files and decoded row groups of one process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.files: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self.groups: OrderedDict[tuple[str, int, int], tuple[Any, np.ndarray, int]] = OrderedDict()
        self.bytes = 0


_cache = _Cache()


def _row_group(url: str, size: int, group: int, image_column: str) -> tuple[Any, np.ndarray]:
    """Return (Arrow binary array of encoded images, labels) of a row group, cached by process."""
    global _cache
    if _cache.pid != os.getpid():
        # A forked child must not use its parent's handles (one shared file offset) nor a held lock.
        _cache = _Cache()
    cache = _cache
    with cache.lock:
        key = (url, size, group)
        if key in cache.groups:
            cache.groups.move_to_end(key)
            return cache.groups[key][:2]
        table = _read_table(cache, url, size, group, image_column)
        labels = _label_array(table.column("label"), f"{url} (row group {group})")
        images = table.column("image").combine_chunks()
        if image_column == "image.bytes":
            images = images.field("bytes")
        cache.groups[key] = (images, labels, table.nbytes)
        cache.bytes += table.nbytes
        while cache.bytes > CACHE_BYTES and len(cache.groups) > 1:
            cache.bytes -= cache.groups.popitem(last=False)[1][2]
        return images, labels


def _read_table(cache: _Cache, url: str, size: int, group: int, image_column: str) -> Any:
    import pyarrow as pa

    if (url, size) not in cache.files:
        cache.files[url, size] = _open(url, size)
        if len(cache.files) > OPEN_FILES:
            cache.files.popitem(last=False)[1].close()
    cache.files.move_to_end((url, size))
    try:
        # One thread: a loader has as many processes as it wants to use cores.
        return cache.files[url, size].read_row_group(group, columns=[image_column, "label"], use_threads=False)
    except (FileNotFoundError, storage.StorageError):
        raise  # not the file's content
    except (pa.ArrowInvalid, OSError) as error:
        raise DamagedDataError(f"{url}: row group {group} cannot be read ({error}); copy the file again") from error
