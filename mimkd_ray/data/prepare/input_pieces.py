"""The input of data preparation: a source, cut into pieces that can be read independently and on any node.

A piece is small enough for the memory of one task (about 1,000 images) and is read whole. Class folders and Hugging
Face Parquet are here; the official ImageNet archives are in archives.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np

from mimkd_ray import storage
from mimkd_ray.data.sources.columns import Columns, label_array
from mimkd_ray.data.sources.folders import list_classes, printable
from mimkd_ray.data.sources.parquet import ParquetSource
from mimkd_ray.data.sources.row_groups import LARGE_BYTES, STREAM_BYTES, STREAM_ROWS, read_beside
from mimkd_ray.data.sources.source import digest_of
from mimkd_ray.errors import DamagedDataError, UserError

PIECE_ROWS = 1000
PIECES = 64  # a small source is cut finer, down to MIN_PIECE_ROWS, so that every worker has a piece
MIN_PIECE_ROWS = 16
MOST_SLICES = 32  # of a large row group: for each of them what comes before is read, too
THREADS = 16  # requests at a time: listings, footers, and files of a piece in an object store


class Sample(NamedTuple):
    """One image of the source: an encoded file, or `b""` if it is missing."""

    label: int
    name: str
    image: bytes


class Piece(Protocol):
    """Some rows of a source. Picklable."""

    @property
    def bytes(self) -> int:
        """Approximate number of bytes to read, for progress and the estimate of disk space."""
        ...

    def samples(self) -> list[Sample]:
        """Read all rows, in the source's order. Raises UserError, DamagedDataError or StorageError."""
        ...


@dataclass(frozen=True)
class Origin:
    """One split of a source. `pieces` follow each other in the order of its rows."""

    classes: tuple[str, ...]
    digest: str
    """Digest that changes with any file's name or size; computed without reading images."""
    pieces: tuple[Piece, ...]
    labels: tuple[np.ndarray, ...] | None
    """Labels of each piece's rows, int64; None if every piece is one whole class, whose rows have not been counted."""


def rows_per_piece(rows: int) -> int:
    """Return the approximate number of rows of a piece of a source with `rows` rows."""
    return min(PIECE_ROWS, max(MIN_PIECE_ROWS, rows // PIECES))


def read_files(urls: Sequence[str]) -> list[bytes]:
    """Return the content of files, in order; many at a time from an object store. A missing file is a UserError."""

    def read(url: str) -> bytes:
        try:
            return storage.read_bytes(url)
        except FileNotFoundError:
            raise UserError(
                f"{printable(url)} was there when the source was listed, and is gone; put it back"
            ) from None

    if not urls or not storage.is_remote(urls[0]):
        return [read(url) for url in urls]
    with ThreadPoolExecutor(THREADS) as pool:  # threads wait for the network and take no CPU
        return list(pool.map(read, urls))


@dataclass(frozen=True)
class FolderPiece:
    """Files of class folders: `files` are paths below `root`, `<class>/<image>`."""

    root: str
    files: tuple[str, ...]
    labels: tuple[int, ...]
    bytes: int

    def samples(self) -> list[Sample]:
        """Read every file."""
        images = read_files([storage.join(self.root, file) for file in self.files])
        return [Sample(*row) for row in zip(self.labels, self.files, images, strict=True)]


def open_folders(root: str, classes: tuple[str, ...] | None) -> Origin:
    """List the class folders below `root`. `classes` are those of the training set, if they are known.

    Raises UserError for no images, and for folders of unknown classes. One listing a folder.
    """
    listed = list_classes(root, classes)
    classes = listed.classes
    number = {name: label for label, name in enumerate(classes)}
    rows = [
        (f"{name}/{file}", number[name], entry.size)
        for name in listed.folders
        for file, entry in listed.images[name].items()
    ]
    step = rows_per_piece(len(rows))
    pieces = []
    for start in range(0, len(rows), step):
        files, labels, sizes = zip(*rows[start : start + step], strict=True)
        pieces.append(FolderPiece(root, files, labels, sum(sizes)))
    return Origin(
        classes, digest_of("folders", classes, rows), tuple(pieces), tuple(np.array(p.labels, np.int64) for p in pieces)
    )


def _name(url: str) -> str:
    return url.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class ParquetPiece:
    """Adjacent row groups of one Parquet file, or rows `skip` to `skip + take` of a large one; `first_row` is the
    number of the piece's first row in the file."""

    url: str
    file_bytes: int
    row_groups: tuple[int, ...]
    first_row: int
    bytes: int
    columns: Columns
    names: tuple[str, ...] | None
    """Classes of labels that are text."""
    skip: int = 0
    take: int = 0
    """0: all rows."""

    def samples(self) -> list[Sample]:
        """Read the row groups, each with one or a few requests; of a large one what comes before the rows, too."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with (
                storage.open_file(self.url, self.file_bytes) as opened,
                pq.ParquetFile(opened, pre_buffer=not self.take, buffer_size=STREAM_BYTES) as file,
            ):
                wanted = [self.columns.image, self.columns.label]
                if self.take:
                    table = _rows(file, self.row_groups[0], wanted, self.skip, self.skip + self.take)
                else:
                    table = file.read_row_groups(list(self.row_groups), columns=wanted, use_threads=False)
        except FileNotFoundError:
            raise UserError(f"{self.url} was there when the source was listed, and is gone; put it back") from None
        except storage.StorageError:
            raise  # not caused by the file's content
        except (pa.ArrowException, OSError) as error:
            raise DamagedDataError(
                f"{self.url}: row groups {self.row_groups[0]} to {self.row_groups[-1]} cannot be read "
                f"({error}); copy the file again"
            ) from error
        samples = []
        labels = label_array(table[self.columns.label], self.url, self.names).tolist()
        for number, (image, label) in enumerate(zip(table[self.columns.image].to_pylist(), labels, strict=True)):
            value = image if isinstance(image, dict) else {"bytes": image}
            name = value.get("path") or f"{_name(self.url)} row {self.first_row + number}"
            samples.append(Sample(label, name, value["bytes"] or read_beside(self.url, value.get("path"))))
        return samples


def _rows(file: Any, group: int, columns: list[str], start: int, stop: int) -> Any:
    """Return rows `start` to `stop` of a row group; memory holds these alone."""
    import pyarrow as pa

    found, row = [], 0
    batches = file.iter_batches(batch_size=STREAM_ROWS, row_groups=[group], columns=columns, use_threads=False)
    for batch in batches:
        if row + len(batch) > start:
            first = max(0, start - row)
            found.append(batch.slice(first, min(len(batch), stop - row) - first))
        row += len(batch)
        if row >= stop:
            break
    return pa.Table.from_batches(found)


def open_parquet(
    files: dict[str, int],
    image_column: str = "",
    label_column: str = "",
    training: Callable[[], tuple[str, ...] | None] | None = None,
) -> Origin:
    """Open Parquet files given as {URL: bytes}. Reads footers and label columns.

    If labels are text, `training` gives the classes of the training split, whose numbers they get: others may lack
    some. Raises UserError for files that are not image sets or disagree, and for labels without a class.
    """
    opened = partial(ParquetSource, files, image_column=image_column, label_column=label_column)
    source = opened()
    if source.names is not None and training is not None:
        source = opened(classes=training())
    labels = source.labels()
    if labels.min() < 0 or labels.max() >= len(source.classes):
        raise UserError(
            f"{next(iter(files))}: labels go from {labels.min()} to {labels.max()}, and {len(source.classes)} classes "
            "are named; sets with hidden labels cannot be prepared"
        )
    with ThreadPoolExecutor(THREADS) as pool:
        groups = list(pool.map(lambda file: _row_groups(*file), files.items()))
    step = rows_per_piece(source.num_rows)
    pieces: list[ParquetPiece] = []
    counts: list[int] = []
    for (url, size), of_file, columns in zip(files.items(), groups, source.columns, strict=True):
        taken: list[int] = []
        first_row = row = held = 0
        for group, (rows, num_bytes) in enumerate(of_file):
            large = num_bytes > LARGE_BYTES and rows > 2 * step
            if taken and (large or row - first_row >= step):
                pieces.append(ParquetPiece(url, size, tuple(taken), first_row, held, columns, source.names))
                counts.append(row - first_row)
                taken, first_row, held = [], row, 0
            if large:
                cut = np.linspace(0, rows, min(MOST_SLICES, rows // step) + 1).astype(int).tolist()
                for start, stop in pairwise(cut):
                    part = (row + start, num_bytes * (stop - start) // rows, columns, source.names)
                    pieces.append(ParquetPiece(url, size, (group,), *part, start, stop - start))
                    counts.append(stop - start)
                row = first_row = row + rows
            else:
                taken.append(group)
                row, held = row + rows, held + num_bytes
        if taken:
            pieces.append(ParquetPiece(url, size, tuple(taken), first_row, held, columns, source.names))
            counts.append(row - first_row)
    # Parts of a preparation that was begun with other pieces do not fit.
    digest = digest_of(source.digest, len(pieces)) if any(piece.take for piece in pieces) else source.digest
    return Origin(source.classes, digest, tuple(pieces), tuple(np.split(labels, np.cumsum(counts)[:-1])))


def _row_groups(url: str, size: int) -> list[tuple[int, int]]:
    import pyarrow.parquet as pq

    with storage.open_file(url, size) as opened, pq.ParquetFile(opened) as file:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        return [(group.num_rows, group.total_byte_size) for group in groups]
