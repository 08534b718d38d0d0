from __future__ import annotations

import os
import pickle
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_sets import images, parquet_set, write_parquet

from mimkd_ray import storage
from mimkd_ray.data import parquet
from mimkd_ray.data.blocks import Blocks
from mimkd_ray.data.parquet import ParquetSource
from mimkd_ray.errors import DamagedDataError, UserError


@pytest.fixture
def train(tmp_path: Path) -> ParquetSource:
    parquet_set(tmp_path, train=32)
    return ParquetSource(storage.list_sizes(str(tmp_path), "of-00002.parquet"))


def test_rows(train: ParquetSource) -> None:
    assert train.num_rows == 32
    assert train.blocks == Blocks.of([5, 5, 5, 1, 5, 5, 5, 1])
    assert train.classes == ("class 0", "class 1", "class 2")
    assert train.label_range() == (0, 2)
    np.testing.assert_array_equal(train.labels(), np.arange(32) % 3)
    assert train.labels().dtype == np.int64
    expected = images(32)
    asked = [31, 0, 16, 15, 0, 20]
    rows = train.read(asked)
    assert [row.id for row in rows] == asked
    assert [row.image for row in rows] == [expected[i] for i in asked]
    assert [row.label for row in rows] == [i % 3 for i in asked]
    assert rows[0].name == "train-00001-of-00002.parquet row 15"


def test_pickles_small_and_reads_elsewhere(train: ParquetSource) -> None:
    data = pickle.dumps(train)
    assert len(data) < 4000
    assert pickle.loads(data).read([17]) == train.read([17])  # noqa: S301


def test_cache_is_bounded(train: ParquetSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_cache", parquet._Cache())
    group = parquet._open(*train.files[0]).read_row_group(0, columns=["image.bytes", "label"]).nbytes
    monkeypatch.setattr(parquet, "CACHE_BYTES", int(2.5 * group))
    monkeypatch.setattr(parquet, "OPEN_FILES", 1)
    expected = images(32)
    for position in [*range(32), *range(31, -1, -1)]:
        assert train.read([position])[0].image == expected[position]
        assert parquet._cache.bytes <= 2.5 * group or len(parquet._cache.groups) == 1
        assert parquet._cache.bytes == sum(entry[2] for entry in parquet._cache.groups.values())
        assert len(parquet._cache.files) == 1


def test_a_forked_child_has_its_own_cache(train: ParquetSource) -> None:
    train.read([0])
    parents = parquet._cache
    parents.lock.acquire()  # as if another thread were reading at the moment of the fork
    try:
        child = os.fork()
        if child == 0:
            os._exit(0 if train.read([7])[0].id == 7 and parquet._cache is not parents else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        parents.lock.release()


def test_digest_sees_names_sizes_and_rows(tmp_path: Path) -> None:
    def digest(name: str, count: int) -> str:
        write_parquet(tmp_path / str(count) / name, images(count), [0] * count, ["a"])
        return ParquetSource(storage.list_sizes(str(tmp_path / str(count)), name)).digest

    assert digest("a.parquet", 6) == digest("a.parquet", 6)
    assert len({digest("a.parquet", 6), digest("b.parquet", 6), digest("a.parquet", 7)}) == 3


def test_without_names_or_statistics(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", images(7), [0, 4, 1, 1, 2, 0, 0], statistics=False, plain=True)
    source = ParquetSource(storage.list_sizes(str(tmp_path)))
    assert source.classes == ("0", "1", "2", "3", "4")
    assert source.label_range() == (0, 4)
    assert source.read([3])[0].image == images(7)[3]


def test_a_missing_image_reads_as_empty(tmp_path: Path) -> None:
    files = images(4)
    files[2] = None
    write_parquet(tmp_path / "x.parquet", files, [0] * 4)
    assert ParquetSource(storage.list_sizes(str(tmp_path))).read([2])[0].image == b""


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"img": pa.array([b"x"]), "label": pa.array([1])},
            "'image' and 'label' are needed, found img, label",
        ),
        ({"image": pa.array(["x"]), "y": pa.array([1])}, "found image, y"),
        ({"image": pa.array([3]), "label": pa.array([1])}, "'image' must be a struct"),
        ({"image": pa.array([{"path": "x"}]), "label": pa.array([1])}, "'image' must be a struct"),
        ({"image": pa.array([b"x"]), "label": pa.array(["cat"])}, "'label' must be an integer; it is string"),
        ({"image": pa.array([b"x"]), "label": pa.array([[1]])}, "'label' must be an integer; it is list"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "hold no rows"),
    ],
)
def test_wrong_columns(tmp_path: Path, columns: dict[str, pa.Array], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match=message):
        ParquetSource(storage.list_sizes(str(tmp_path)))


def test_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "train-0.parquet").write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match=r"train-0\.parquet \(16 bytes\) is not a readable Parquet file"):
        ParquetSource(storage.list_sizes(str(tmp_path)))


def test_missing_labels(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", images(3), [0, None, 1])
    source = ParquetSource(storage.list_sizes(str(tmp_path)))
    with pytest.raises(UserError, match="1 of 3 rows have no label"):
        source.labels()
    with pytest.raises(UserError, match="no label"):
        source.read([0])


def test_files_that_disagree(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", images(2), [0, 1], ["a", "b"])
    write_parquet(tmp_path / "train-1.parquet", images(2), [0, 1], ["a", "b", "c"])
    with pytest.raises(UserError, match=r"train-1\.parquet names 3 classes .* names 2"):
        ParquetSource(storage.list_sizes(str(tmp_path)))


def test_a_failing_store_is_not_taken_for_a_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    parquet_set(tmp_path)
    storage.upload(tmp_path / "train-00000-of-00002.parquet", f"{root}/train-0.parquet")
    source = ParquetSource(storage.list_sizes(root))
    monkeypatch.setattr(parquet, "_cache", parquet._Cache())
    source.read([0])

    def fail(*args: object, **options: object) -> None:
        raise OSError("connection reset")

    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(storage._filesystem(root), "cat_file", fail)
    with pytest.raises(storage.StorageError, match=rf"could not read {root}/train-0\.parquet in 5 tries"):
        source.read([10])


def test_a_broken_row_group_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train-0.parquet"
    write_parquet(path, images(10), [0] * 10)
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    source = ParquetSource(storage.list_sizes(str(tmp_path)))
    assert source.read([0])[0].id == 0
    with pytest.raises(DamagedDataError, match=r"train-0\.parquet: row group 1 cannot be read"):
        source.read([7])
