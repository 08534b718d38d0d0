"""Writing of features to Parquet files, and their commit.

A file holds `id` (int64, with statistics) and `feature` (fixed-size binary), non-null, without compression, one page a
column chunk: any Parquet reader reads it, and ours finds ids and features as plain arrays in the bytes of a row group,
at places that are written into its record and checked here.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from mimkd_ray import storage
from mimkd_ray.teacher_cache.feature_manifest import (
    Error,
    FeatureBlock,
    Record,
    record_url,
    shard_name,
    to_json,
    view_url,
)

BLOCK_ROWS = 1024
"""Most rows of a row group: larger blocks of the data set are cut, so that reading a few rows never takes many
megabytes."""

ONE_PAGE = 2**31 - 1


def block_rows(counts: Sequence[int]) -> list[int]:
    """Return the rows of the features' row groups for image blocks of `counts` rows: equal, with large ones cut."""
    return [min(BLOCK_ROWS, rows - start) for rows in counts for start in range(0, rows, BLOCK_ROWS)]


def feature_file(ids_N: np.ndarray, rows_NB: np.ndarray, counts: Sequence[int]) -> tuple[bytes, list[FeatureBlock]]:
    """Return a Parquet file of ids (int64) and features (uint8 rows), in row groups of `counts` rows, and its blocks.

    The same input and version of pyarrow give the same bytes. Holds the features three times in memory.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert sum(counts) == len(ids_N) == len(rows_NB), f"{counts} rows in groups, {len(ids_N)} ids, {len(rows_NB)} rows"
    feature = pa.binary(rows_NB.shape[1])
    schema = pa.schema([pa.field("id", pa.int64(), nullable=False), pa.field("feature", feature, nullable=False)])
    rows_NB = np.ascontiguousarray(rows_NB)
    column = pa.FixedSizeBinaryArray.from_buffers(feature, len(rows_NB), [None, pa.py_buffer(rows_NB)])
    table = pa.table([pa.array(ids_N.astype(np.int64, copy=False)), column], schema=schema)
    sink = pa.BufferOutputStream()
    options: dict[str, Any] = {"compression": "NONE", "use_dictionary": False, "write_statistics": ["id"]}
    with pq.ParquetWriter(sink, schema, data_page_size=ONE_PAGE, max_rows_per_page=ONE_PAGE, **options) as writer:
        start = 0
        for count in counts:
            writer.write_table(table.slice(start, count), row_group_size=count)
            start += count
    data = sink.getvalue().to_pybytes()
    return data, _blocks(data, ids_N, rows_NB, counts)


def _blocks(data: bytes, ids_N: np.ndarray, rows_NB: np.ndarray, counts: Sequence[int]) -> list[FeatureBlock]:
    """Find the arrays in the file: they are at the end of a column chunk."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(io.BytesIO(data))
    view = memoryview(data)
    blocks, start = [], 0
    for group, count in enumerate(counts):
        places = []
        offset = ends = 0
        for number, array in enumerate((ids_N, rows_NB)):
            chunk = metadata.row_group(group).column(number)
            end = chunk.data_page_offset + chunk.total_compressed_size
            offset = chunk.data_page_offset if number == 0 else offset
            part = np.ascontiguousarray(array[start : start + count]).view(np.uint8).reshape(-1)
            at = end - len(part)
            if not np.array_equal(np.frombuffer(view[at:end], np.uint8), part):
                raise RuntimeError(f"this pyarrow does not write column {number} as one plain page: it cannot be used")
            places.append(at - offset)
            ends = end
        sha256 = hashlib.sha256(view[offset:ends]).hexdigest()
        blocks.append(FeatureBlock(offset, ends - offset, count, sha256, *places))
        start += count
    return blocks


def write_shard(
    root: str,
    key: str,
    view: int,
    first: int,
    ids_N: np.ndarray,
    rows_NB: np.ndarray,
    counts: Sequence[int],
    damaged: Sequence[int],
    error: Error,
) -> Record:
    """Write the features of positions `first`, ... of a view, and commit them. A repeated call writes the same objects.

    Raises UserError for a full disk, StorageError.
    """
    data, blocks = feature_file(ids_N, rows_NB, counts)
    sha256 = hashlib.sha256(data).hexdigest()
    end = blocks[-1].offset + blocks[-1].length
    record = Record(
        first,
        len(ids_N),
        f"{shard_name(first, len(ids_N))}-{sha256[:16]}.parquet",
        len(data),
        sha256,
        tuple(blocks),
        (end, len(data) - end, hashlib.sha256(memoryview(data)[end:]).hexdigest()),
        tuple(damaged),
        error,
    )
    storage.write_bytes(storage.join(view_url(root, key, view), record.file), data)
    storage.write_bytes(record_url(root, key, view, record.file), to_json(record))
    return record
