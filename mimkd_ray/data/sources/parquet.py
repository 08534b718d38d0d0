"""Image data sets in Parquet: `image: struct<bytes, path>` (Hugging Face) or binary, `label: int64` or text, or columns
of other names (columns.py).

A file is a shard, a row group is a block. Opening reads footers only. A prepared set (`shard_manifest.py`) has blocks
of one size; each is read by one request, and its bytes are compared with the manifest's sha256 before anything is
decoded. Row groups of other files are used in their own sizes.

Blocks go through the block store, so a row group is fetched and decoded once per node. Uncompressed images on a local
disk stay in their file, and the store keeps only their places. Without a store each process keeps the last blocks, and
rows from far more blocks than that cost a row group each, unless they are on a local disk.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mimkd_ray import storage
from mimkd_ray.config.data import MOST_CLASSES
from mimkd_ray.data.augment.decode import DECODING, Decoding
from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.data.sources.columns import NO_LABEL, Columns, class_names, find_columns, label_array, plain_text
from mimkd_ray.data.sources.row_groups import UNCOMPRESSED, chunk_span, open_parquet, read_row_group
from mimkd_ray.data.sources.shard_manifest import Block, Manifest, Shard
from mimkd_ray.data.sources.source import Row, Source, digest_of, numbered_classes
from mimkd_ray.data.store.block_reader import BlockReader, forget
from mimkd_ray.data.store.block_store import BlockStore
from mimkd_ray.data.store.local_disk import is_on_local_disk
from mimkd_ray.data.store.stored_block import StoredBlock
from mimkd_ray.errors import UserError

logger = logging.getLogger(__name__)

FOOTER_THREADS = 16
KEPT_PLACES = 2**16  # of blocks, some 250 bytes each; a look-up takes 3 us
INDEX_BYTES = 24  # that the store keeps of a row that is read in place


class _Group(NamedTuple):
    rows: int
    start: int
    stop: int  # byte after the last one
    images: int  # bytes, decompressed
    plain: bool  # whether images are not compressed, so that they can be read where they are


class _Footer(NamedTuple):
    row_groups: tuple[_Group, ...]
    label_range: tuple[int, int] | None  # None: no statistics
    classes: tuple[str, ...]  # () if the file does not name them
    columns: Columns


class _Place(NamedTuple):
    """Location of a block: its key, its file's name, the position of that file's first row, and the bytes that are read
    for it from slow storage."""

    key: str
    name: str
    first: int
    bytes: int


class ParquetSource(Source):
    """The rows of Parquet files, one file after the other in the given order; id = row number = position."""

    def __init__(
        self,
        files: Mapping[str, int],
        *,
        manifest: Manifest | None = None,
        versions: Mapping[str, str] | None = None,
        store: BlockStore | None = None,
        how: Decoding = DECODING,
        image_column: str = "",
        label_column: str = "",
        classes: tuple[str, ...] | None = None,
        labelled: bool = True,
    ) -> None:
        """Open the files. `files` maps each URL to its size in bytes, as from `storage.list_sizes`.

        With a `manifest` its shards are the files, in its order, and `files` is what they are checked against.
        `image_column` and `label_column` name columns that cannot be found. `classes` are the training set's, for
        labels that are text. Not `labelled`: labels may be missing, or be none. `versions` (of `storage.Entry`)
        tell files of one name and size apart in the store.

        Raises UserError for a file that is not Parquet, lacks columns, or disagrees with the others about classes, and
        for a manifest that does not fit the files.
        """
        if manifest is not None:
            files = _listed_shards(files, manifest)
        self.files: tuple[tuple[str, int], ...] = tuple(files.items())
        self.store = store
        self.how = how
        first = next(iter(files), "")
        self.in_place: bool = not storage.is_remote(first) and is_on_local_disk(storage.local_path(first))
        self.distant = not self.in_place  # blocks are copied from object storage or a network file system
        self.versions = tuple((versions or {}).get(url, "") for url in files)
        with ThreadPoolExecutor(min(FOOTER_THREADS, max(1, len(self.files)))) as pool:
            read = partial(_read_footer, image_column=image_column, label_column=label_column, labelled=labelled)
            footers = list(pool.map(lambda file: read(*file), self.files))
        self.columns = tuple(f.columns for f in footers)
        self.names: tuple[str, ...] | None = None
        self._ranges = tuple(f.label_range for f in footers)
        groups = [group for f in footers for group in f.row_groups]
        row_groups = tuple(group.rows for group in groups)
        self.blocks = Blocks.of(row_groups)
        # Block b is row group b - _file_block[f] of file f, the last one with _file_block[f] <= b.
        self._file_block = np.cumsum([0, *(len(f.row_groups) for f in footers)])
        self.num_rows = self.blocks.num_rows
        if self.num_rows == 0:
            raise UserError(f"{self.files[0][0]}: the {len(self.files)} Parquet file(s) of this split hold no rows")
        stay = [self.in_place and group.plain for group in groups]
        # By block, that are read for it; what stays where it is costs next to nothing.
        self._bytes = np.array([0 if s else g.stop - g.start for g, s in zip(groups, stay, strict=True)])
        stored = sum(INDEX_BYTES * g.rows + (0 if s else g.images) for g, s in zip(groups, stay, strict=True))
        self.block_bytes = stored // self.blocks.num_blocks
        self._places: dict[int, _Place] = {}
        self._loaded_again: set[int] = set()
        self._listed: tuple[Block, ...] = ()
        if manifest is None:
            if any(columns.text for columns in self.columns):
                self.names = classes or self._named_in_rows()
            self.classes = self._agree_on_classes(footers)
            names = [(_base(url), size) for url, size in self.files]
            others = [columns for columns in self.columns if not columns.usual]
            self.digest = digest_of("parquet", names, row_groups, self.classes, *others)
        else:
            for (url, _), footer, shard in zip(self.files, footers, manifest.shards, strict=True):
                _check_row_groups(url, footer, shard)
            self._listed = tuple(block for shard in manifest.shards for block in shard.blocks)
            self.blocks = Blocks.uniform(manifest.rows, manifest.block_rows)
            self.classes = manifest.classes
            self.digest = manifest.digest

    @property
    def prepared(self) -> bool:
        """True if the files are those of a manifest, whose digests cover all their bytes."""
        return bool(self._listed)

    def labels(self) -> np.ndarray:
        """Return all labels (int64). Reads the label column of every file."""
        with ThreadPoolExecutor(min(FOOTER_THREADS, len(self.files))) as pool:
            columns = list(pool.map(self.file_labels, range(len(self.files))))
        return np.concatenate(columns)

    def file_labels(self, file: int) -> np.ndarray:
        """Return the labels of a file (int64), by its number in `files`."""
        url = self.files[file][0]
        if not self.columns[file].label:
            first, stop = self._file_block[file], self._file_block[file + 1]
            return np.full(self.blocks.start(int(stop)) - self.blocks.start(int(first)), NO_LABEL, dtype=np.int64)
        columns = self.columns[file]
        return label_array(_label_column(*self.files[file], columns.label), url, self.names, columns.strict)

    def _named_in_rows(self) -> tuple[str, ...]:
        """Return the distinct labels of all files, sorted, where they are text."""
        found: set[str] = set()
        for (url, size), columns in zip(self.files, self.columns, strict=True):
            if not columns.text:
                raise UserError(f"{url}: column '{columns.label}' has numbers, and that of other files is text")
            found.update(plain_text(_label_column(url, size, columns.label)).unique().to_pylist())
        return tuple(sorted(name for name in found if name is not None))

    def label_range(self) -> tuple[int, int]:
        """Return the smallest and largest label, from the footers' statistics if all files have them."""
        known = [r for r in self._ranges if r is not None]
        if len(known) < len(self._ranges):
            labels = self.labels()
            return int(labels.min()), int(labels.max())
        return min(low for low, _ in known), max(high for _, high in known)

    def read(self, positions: Sequence[int]) -> list[Row]:
        """Return the rows at `positions`, in order. Raises DamagedDataError for an unreadable row group."""
        blocks, insides = self.blocks.locate(positions)
        reader = BlockReader(self.store)
        rows = []
        for position, block, inside in zip(positions, blocks.tolist(), insides.tolist(), strict=True):
            key, name, first, size = self._places.get(block) or self._place(block)
            image, label = reader.row(key, partial(self._load, block), inside, size)
            rows.append(Row(int(position), label, image, f"{name} row {position - first}", self.how))
        return rows

    def read_again(self, position: int) -> Row | None:
        """Return the row of its block loaded and verified anew, once in this process."""
        block = int(self.blocks.locate([position])[0][0])
        if block not in self._loaded_again:
            self._loaded_again.add(block)
            file = self._file(block)
            group = block - int(self._file_block[file])
            logger.warning(
                "%s: an image of row group %d cannot be decoded: it is fetched and verified anew",
                *(self.files[file][0], group),
            )
            forget(self.store, self._key(block))
        return self.read([position])[0]

    def fetch(self, block: int) -> bool:
        """Fetch the row group into the store; return whether it is there (False: no store, or no room)."""
        load, size = partial(self._load, block), int(self._bytes[block])
        return self.store is not None and self.store.fetch(self._key(block), load, size)

    def _file(self, block: int) -> int:
        return int(np.searchsorted(self._file_block, block, side="right")) - 1

    def _place(self, block: int) -> _Place:
        """Return and cache the location of a block: a batch may use as many blocks as it has rows."""
        file = self._file(block)
        first = self.blocks.start(int(self._file_block[file]))
        if len(self._places) >= KEPT_PLACES:
            self._places.clear()
        name, size = _base(self.files[file][0]), int(self._bytes[block])
        place = self._places[block] = _Place(self._key(block), name, first, size)
        return place

    def _key(self, block: int) -> str:
        file = self._file(block)
        url, size = self.files[file]
        if self._listed:
            place = f" {url}" if self.in_place else ""
            return f"{self._listed[block].sha256} {self.blocks.start(block)}{place}"  # its ids are checked, too
        others = () if self.columns[file].usual else (self.columns[file], self.names)
        return digest_of(url, size, self.versions[file], block - int(self._file_block[file]), *others)

    def _load(self, block: int) -> StoredBlock:
        file = self._file(block)
        group, columns = block - int(self._file_block[file]), self.columns[file]
        listed, first = self._listed[block] if self._listed else None, self.blocks.start(block)
        return read_row_group(*self.files[file], group, columns, listed, first, self.in_place, self.names)

    def _agree_on_classes(self, footers: list[_Footer]) -> tuple[str, ...]:
        if self.names is not None:
            return self.names
        first = footers[0].classes
        for (url, _), footer in zip(self.files, footers, strict=True):
            if footer.classes != first:
                raise UserError(
                    f"{url} names {len(footer.classes)} classes and {self.files[0][0]} names {len(first)}, "
                    "or others: the files of one split must agree; remove the file that does not belong to it"
                )
        return first or numbered_classes(self.label_range()[1], self.files[0][0])


def _base(url: str) -> str:
    return url.rpartition("/")[2]


_COPY_AGAIN = "copy the prepared set again as a whole, or prepare it anew"


def _listed_shards(files: Mapping[str, int], manifest: Manifest) -> dict[str, int]:
    """Return {URL: bytes} of the manifest's shards. Raises UserError for one that is missing or has another size."""
    listed = {_base(url): (url, size) for url, size in files.items()}
    found = {}
    for shard in manifest.shards:
        if shard.file not in listed:
            raise UserError(
                f"{shard.file} is missing: the manifest of split '{manifest.split}' names {len(manifest.shards)} "
                f"files, and {len(listed)} are there; {_COPY_AGAIN}"
            )
        url, size = listed[shard.file]
        if size != shard.bytes:
            raise UserError(f"{url} has {size:,} bytes, and its manifest says {shard.bytes:,}; {_COPY_AGAIN}")
        found[url] = size
    return found


def _check_row_groups(url: str, footer: _Footer, shard: Shard) -> None:
    """Raise UserError if the file's row groups differ from those of the manifest."""
    rows = sum(group.rows for group in footer.row_groups)
    if len(footer.row_groups) != len(shard.blocks) or rows != shard.rows:
        raise UserError(
            f"{url} holds {rows:,} rows in {len(footer.row_groups)} row groups, and its manifest says {shard.rows:,} "
            f"in {len(shard.blocks)}; {_COPY_AGAIN}"
        )
    for number, (group, block) in enumerate(zip(footer.row_groups, shard.blocks, strict=True)):
        if group.rows != block.rows or group.start < block.offset or group.stop > block.offset + block.length:
            raise UserError(
                f"{url}: row group {number} holds {group.rows:,} rows in bytes {group.start:,} to {group.stop:,}, and "
                f"its manifest says {block.rows:,} rows in {block.offset:,} to {block.offset + block.length:,}; "
                f"{_COPY_AGAIN}"
            )


def _read_footer(url: str, size: int, image_column: str, label_column: str, labelled: bool) -> _Footer:
    with open_parquet(url, size) as file:
        metadata, schema = file.metadata, file.schema_arrow
        columns = find_columns(metadata, schema, url, image_column, label_column, labelled)
        groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
        row_groups = tuple(_group(group, columns) for group in groups)
        if not columns.label:
            return _Footer(row_groups, (NO_LABEL, NO_LABEL), (), columns)
        place = [metadata.schema.column(i).path for i in range(len(metadata.schema))].index(columns.label)
        ranges = [_statistics(group.column(place)) for group in groups if group.num_rows and not columns.text]
        known = [r for r in ranges if r is not None]
        whole = (min(r[0] for r in known), max(r[1] for r in known)) if known and len(known) == len(ranges) else None
        if whole is not None and whole[1] >= MOST_CLASSES and not columns.strict:
            whole = None  # of what is left after these have been taken for none
        return _Footer(row_groups, whole, class_names(schema.metadata, columns.label), columns)


def _group(group: Any, columns: Columns) -> _Group:
    """Return what is to be known of a row group; `start` and `stop` are those of all its columns together."""
    chunks = {chunk.path_in_schema: chunk for chunk in map(group.column, range(group.num_columns))}
    spans = [chunk_span(chunk) for chunk in chunks.values()]
    images = chunks[columns.bytes_path]
    start, stop = min(first for first, _ in spans), max(end for _, end in spans)
    return _Group(group.num_rows, start, stop, images.total_uncompressed_size, images.compression == UNCOMPRESSED)


def _statistics(column: Any) -> tuple[int, int] | None:
    if not column.is_stats_set or not column.statistics.has_min_max or column.physical_type in ("FLOAT", "DOUBLE"):
        return None  # of floats they leave out NaN, which is a missing label
    if not column.statistics.has_null_count:
        return None
    low = NO_LABEL if column.statistics.null_count else int(column.statistics.min)
    return min(low, int(column.statistics.min)), int(column.statistics.max)


def _label_column(url: str, size: int, label: str) -> Any:
    with open_parquet(url, size) as file:
        return file.read(columns=[label], use_threads=False).column(label)
