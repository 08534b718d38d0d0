"""Feature files as any Parquet reader sees them, and as ours does."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from feature_sets import KEY, NOTHING_LOST, SHARDS, features, ids, write_shards

from mimkd_ray import storage
from mimkd_ray.teacher_cache.feature_manifest import committed
from mimkd_ray.teacher_cache.writer import BLOCK_ROWS, block_rows, feature_file, write_shard


def test_any_parquet_reader_reads_it() -> None:
    data, _ = feature_file(ids(37), features(rows=37), SHARDS[0])
    file = pq.ParquetFile(io.BytesIO(data))
    assert [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] == [16, 16, 5]
    table = file.read()
    assert str(table.schema).splitlines() == [
        "id: int64 not null",
        "feature: fixed_size_binary[40] not null",
    ]
    assert table.column("id").to_pylist() == ids(37).tolist()
    assert table.column("feature").to_pylist() == [row.tobytes() for row in features(rows=37)]
    for group in range(3):
        id_chunk, feature_chunk = (file.metadata.row_group(group).column(c) for c in (0, 1))
        assert (id_chunk.compression, feature_chunk.compression) == ("UNCOMPRESSED", "UNCOMPRESSED")
        assert id_chunk.statistics.min == ids(37)[16 * group]
        assert feature_chunk.statistics is None or not feature_chunk.statistics.has_min_max


@pytest.mark.parametrize("width", [1, 80, 401_408])
def test_arrays_lie_where_the_blocks_say(width: int) -> None:
    rows, counts = (37, (16, 16, 5)) if width < 1000 else (9, (7, 2))
    values = features(width, rows=rows)
    data, blocks = feature_file(ids(rows), values, counts)
    start = 0
    for block, count in zip(blocks, counts, strict=True):
        part = data[block.offset : block.offset + block.length]
        assert hashlib.sha256(part).hexdigest() == block.sha256
        assert part[block.ids_at : block.ids_at + 8 * count] == ids(rows)[start : start + count].tobytes()
        assert part[block.values_at :] == values[start : start + count].tobytes()
        start += count
    assert len(data) < values.nbytes + 8 * rows + 2000 + 300 * len(counts), "little beside ids and features"


def test_the_same_rows_are_the_same_bytes(tmp_path: Path) -> None:
    first = write_shards(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert write_shards(tmp_path) == first
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    assert len(files) == 4
    for record in first:
        assert storage.size(f"{tmp_path}/{KEY}/view-00000/{record.file}") == record.bytes
        assert record.file.endswith(f"-{record.sha256[:16]}.parquet")


def test_large_blocks_are_cut() -> None:
    assert block_rows((5, 2 * BLOCK_ROWS + 3, BLOCK_ROWS)) == [5, BLOCK_ROWS, BLOCK_ROWS, 3, BLOCK_ROWS]


def test_a_shard_is_committed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is written when its file is there; a file that is cut short since counts for nothing."""
    written: list[str] = []
    real = storage.write_bytes
    monkeypatch.setattr(storage, "write_bytes", lambda url, data: (written.append(url), real(url, data)))
    record = write_shard(str(tmp_path), KEY, 0, 0, ids(37), features(rows=37), SHARDS[0], (), NOTHING_LOST)
    assert [url.rpartition(".")[2] for url in written] == ["parquet", "json"]
    assert committed(str(tmp_path), KEY, 0) == {(0, 37): record}
    path = Path(written[0])
    path.write_bytes(path.read_bytes()[:-1])
    assert committed(str(tmp_path), KEY, 0) == {}


def test_counts_must_be_those_of_the_rows() -> None:
    with pytest.raises(AssertionError, match="36 ids"):
        feature_file(ids(36), features(rows=37), (16, 16, 5))
    assert np.array_equal(features(), features())
