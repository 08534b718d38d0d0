from __future__ import annotations

import os
import pickle
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_sets import images, parquet_set, prepared_set, write_parquet

from mimkd_ray import remote_filesystem, retries, storage
from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.data.sources import parquet, row_groups
from mimkd_ray.data.sources.parquet import ParquetSource
from mimkd_ray.data.sources.shard_manifest import Manifest, Shard, content_digest, read_manifest
from mimkd_ray.data.store import block_reader
from mimkd_ray.data.store.block_store import BlockStore
from mimkd_ray.data.store.stored_block import StoredBlock
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


def test_without_a_store_the_last_row_groups_are_kept(train: ParquetSource, monkeypatch: pytest.MonkeyPatch) -> None:
    group = train._load(0).held_bytes
    monkeypatch.setattr(block_reader, "CACHE_BYTES", int(2.5 * group))
    expected = images(32)
    for position in [*range(32), *range(31, -1, -1)]:
        assert train.read([position])[0].image == expected[position]
        assert block_reader._blocks.bytes <= 2.5 * group or len(block_reader._blocks) == 1


def test_through_the_store_a_row_group_is_read_once(
    tmp_path: Path, train: ParquetSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {url: "1" for url, _ in train.files}
    stored = ParquetSource(dict(train.files), versions=versions, store=BlockStore(tmp_path / "blocks"))
    rows = train.read(range(32))
    assert stored.read(range(32)) == rows
    assert stored.fetch(7)
    monkeypatch.setattr(block_reader, "_blocks", block_reader._KeptBlocks())  # as another process

    def never(*args: object) -> None:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(ParquetSource, "_load", never)
        again = pickle.loads(pickle.dumps(stored))  # noqa: S301
        assert again.read([17, 3]) == [rows[17], rows[3]]
        with pytest.raises(AssertionError, match="read again"):  # files written again are read again
            ParquetSource(dict(train.files), versions=dict.fromkeys(versions, "2"), store=stored.store).read([3])


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
            {"a": pa.array([b"x"]), "b": pa.array([b"y"]), "label": pa.array([1])},
            r"2 columns may be the images, found a \(binary\), b \(binary\), label .*--data.image-column",
        ),
        ({"image": pa.array(["x"]), "y": pa.array([1])}, r"no column of images .* found image \(string\), y"),
        ({"image": pa.array([3]), "label": pa.array([1])}, r"no column of images .* a struct with a binary field"),
        ({"image": pa.array([{"path": "x"}]), "label": pa.array([1])}, "no column of images"),
        ({"image": pa.array([b"x"]), "label": pa.array([[1]])}, r"no column of labels .*label \(list.*label-column"),
        ({"image": pa.array([b"x"]), "caption": pa.array(["a cat"])}, "no column of labels"),
        ({"image": pa.array([b"x"]), "id": pa.array([7])}, "no column of labels"),
        ({"image": pa.array([b"x"]), "a": pa.array([7]), "b": pa.array([7])}, "2 columns may be the labels"),
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
    assert source.labels().tolist() == [0, -1, 1]
    assert source.label_range() == (-1, 1)
    assert [row.label for row in source.read([0, 1])] == [0, -1]


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
    source.read([0])

    def fail(*args: object, **options: object) -> None:
        raise OSError("connection reset")

    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)
    monkeypatch.setenv(retries.PATIENCE, "0")
    monkeypatch.setattr(remote_filesystem.filesystem(root), "cat_file", fail)
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


def _prepared(root: Path, store: BlockStore | None = None) -> ParquetSource:
    files = storage.list_sizes(str(root), ".parquet")
    return ParquetSource(files, manifest=read_manifest(str(root), "train"), store=store)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_prepared_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool) -> None:
    monkeypatch.setattr(parquet, "is_on_local_disk", lambda path: in_place)
    source = _prepared(prepared_set(tmp_path / "set"), BlockStore(tmp_path / "blocks"))
    manifest = read_manifest(str(tmp_path / "set"), "train")
    assert manifest is not None
    assert (source.digest, source.classes) == (manifest.digest, ("class 0", "class 1", "class 2"))
    assert source.blocks == Blocks.uniform(32, 5)
    assert source.label_range() == (0, 2)
    requests = []
    read_range = storage.read_range
    monkeypatch.setattr(storage, "read_range", lambda *place: requests.append(place) or read_range(*place))
    rows = source.read([31, 0, 4, 15, 16])
    assert [row.id for row in rows] == [31, 0, 4, 15, 16]
    assert [row.image for row in rows] == [images(32)[i] for i in (31, 0, 4, 15, 16)]
    assert [row.label for row in rows] == [1, 0, 1, 0, 1]
    assert rows[0].name == "train-00002-of-00003.parquet row 1"
    assert len(requests) == 3  # one for each block
    kept = [path.stat().st_size for path in (tmp_path / "blocks").glob("*.block")]
    assert len(kept) == 3
    assert all(size < 500 for size in kept) == in_place  # the images are in the store, or where they were
    assert source.block_bytes == (24 * 32 // 7 if in_place else pytest.approx(sum(kept) / 3, rel=0.5))


def test_the_rows_are_arrows(tmp_path: Path) -> None:
    """Compressed, with a dictionary, with columns in between, plain, or with an image missing: the same rows."""
    files: list[bytes | None] = [*images(11), None]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = pa.array([{"bytes": f, "path": "x"} for f in files], kind)
    filler = pa.array([bytes(range(256)) * 100] * 12)
    options: dict[str, dict[str, object]] = {
        "snappy": {"compression": "snappy", "use_dictionary": False},
        "dictionary": {"compression": "none", "use_dictionary": True},
        "plain": {"compression": "none", "use_dictionary": False},
    }
    for name, settings in options.items():
        for between in (False, True):
            columns = {"image": image, **({"filler": filler} if between else {}), "label": pa.array(range(12))}
            path = tmp_path / f"{name}-{between}.parquet"
            pq.write_table(pa.table(columns), path, row_group_size=4, **settings)
            source = ParquetSource({str(path): path.stat().st_size}, store=BlockStore(tmp_path / "blocks"))
            rows = source.read([11, 3, 0, 7, 4])
            kept = sum(file.stat().st_size for file in (tmp_path / "blocks").glob("*.block"))
            (tmp_path / "blocks").rename(tmp_path / f"blocks of {path.name}")
            images_of_one = sum(map(len, images(11))) // 3
            if name == "snappy":
                assert kept > 2 * images_of_one
                assert kept / 3 < source.block_bytes < 2 * kept / 3, "with what Arrow says of pages of few images"
                assert source._bytes.min() > 0
            elif name == "plain":
                assert (source.block_bytes, source._bytes.max()) == (96, 0)
                assert kept < images_of_one
            assert [row.image for row in rows] == [files[i] or b"" for i in (11, 3, 0, 7, 4)]
            assert [row.label for row in rows] == [11, 3, 0, 7, 4]


def test_a_store_of_an_earlier_release_is_read_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It kept a row group as it came, and where its images lie in it."""
    monkeypatch.setattr(parquet, "is_on_local_disk", lambda path: False)
    store = BlockStore(tmp_path / "blocks")
    source = _prepared(prepared_set(tmp_path / "set"), store)
    url, _ = source.files[0]
    (listed, *_) = source._listed
    data = Path(url).read_bytes()[listed.offset : listed.offset + listed.length]
    expected = [image or b"" for image in images(5)]
    offsets = np.array([data.index(image) for image in expected])
    lengths = np.array([len(image) for image in expected])
    store.get(source._key(0), lambda: StoredBlock(offsets, lengths, np.arange(5) % 3, data=data))
    (file,) = store.folder.glob("*.block")
    assert file.read_bytes().startswith(data)
    monkeypatch.setattr(ParquetSource, "_load", lambda *_: pytest.fail("it was read again"))
    rows = source.read(range(5))
    assert [(row.image, row.label) for row in rows] == [(image, i % 3) for i, image in enumerate(expected)]


def test_a_shard_written_again_in_place(tmp_path: Path) -> None:
    """The bytes that were verified are not those that are there now."""
    root = prepared_set(tmp_path / "set")
    source = _prepared(root, BlockStore(tmp_path / "blocks"))
    shard = root / "train-00000-of-00003.parquet"
    before = source.read([7])[0].image
    data = shard.read_bytes()
    shard.write_bytes(data)  # the same once more
    assert source.read([7])[0].image == before
    shard.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
    with pytest.raises(DamagedDataError, match=r"00000-of-00003\.parquet: row group \d is damaged"):
        source.read(range(15))


def _prepared_copy(tmp_path: Path, shard: str, change: Callable[[bytearray], object]) -> Path:
    root = prepared_set(tmp_path / "set")
    data = bytearray((root / shard).read_bytes())
    change(data)
    (root / shard).write_bytes(data)
    return root


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("with_store", [False, True])
def test_a_flipped_byte_is_never_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_store: bool, in_place: bool
) -> None:
    monkeypatch.setattr(parquet, "is_on_local_disk", lambda path: in_place)
    image = images(32)[7]
    assert image is not None

    def flip(data: bytearray) -> None:
        data[data.index(image) + len(image) // 2] ^= 4

    root = _prepared_copy(tmp_path, "train-00000-of-00003.parquet", flip)
    source = _prepared(root, BlockStore(tmp_path / "blocks") if with_store else None)
    assert len(source.read([0, 12])) == 2  # its neighbours are sound
    for _ in range(2):
        with pytest.raises(
            DamagedDataError,
            match=r"train-00000-of-00003\.parquet: row group 1 is damaged: its [\d,]+ bytes have the sha256 "
            r"[0-9a-f]{12}\.\.\., and the manifest says [0-9a-f]{12}\.\.\.; copy the file again",
        ):
            source.read([7])
        if with_store:
            with pytest.raises(DamagedDataError, match="is damaged"):
                source.fetch(1)


def test_a_truncated_shard(tmp_path: Path) -> None:
    root = _prepared_copy(tmp_path, "train-00001-of-00003.parquet", lambda data: data.__delitem__(slice(-100, None)))
    with pytest.raises(UserError, match=r"00001-of-00003\.parquet has [\d,]+ bytes, and its manifest says [\d,]+"):
        _prepared(root)


def test_a_shard_that_is_cut_short_while_training(tmp_path: Path) -> None:
    source = _prepared(prepared_set(tmp_path))
    source.read([0])
    os.truncate(source.files[0][0], 600)
    with pytest.raises(DamagedDataError, match=r"00000-of-00003\.parquet is cut short: [\d,]+ of the [\d,]+ bytes"):
        source.read([12])


@pytest.mark.parametrize("prepared", [False, True])
def test_a_shard_that_goes_away_while_training(tmp_path: Path, prepared: bool) -> None:
    root = prepared_set(tmp_path)
    source = _prepared(root) if prepared else ParquetSource(storage.list_sizes(str(root), "of-00003.parquet"))
    source.read([0])
    Path(source.files[1][0]).unlink()
    with pytest.raises(DamagedDataError, match=r"train-00001-of-00003\.parquet is gone"):
        source.read([16])


def test_a_missing_shard(tmp_path: Path) -> None:
    root = prepared_set(tmp_path)
    (root / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(UserError, match=r"train-00001-of-00003\.parquet is missing: the manifest .* names 3 files"):
        _prepared(root)


def test_a_manifest_of_another_preparation(tmp_path: Path) -> None:
    """File names and sizes agree, the content of the files does not."""
    root = prepared_set(tmp_path / "a")
    manifest = read_manifest(str(root), "train")
    assert manifest is not None
    shard = manifest.shards[0]
    other = _with_shards(manifest, shard._replace(rows=10, blocks=shard.blocks[:2]), rows=10)
    with pytest.raises(UserError, match="holds 15 rows in 3 row groups, and its manifest says 10 in 2"):
        ParquetSource(storage.list_sizes(str(root), ".parquet"), manifest=other)
    moved = (shard.blocks[0], shard.blocks[1]._replace(length=50), shard.blocks[2])
    other = _with_shards(manifest, shard._replace(blocks=moved), rows=15)
    with pytest.raises(UserError, match=r"row group 1 holds 5 rows in bytes [\d,]+ to [\d,]+, and its manifest says"):
        ParquetSource(storage.list_sizes(str(root), ".parquet"), manifest=other)
    second = manifest.shards[1]
    other = _with_shards(manifest, second, rows=15)
    with pytest.raises(DamagedDataError, match="has the ids 15 to 19, and its place in the manifest says 0 to 4"):
        ParquetSource(storage.list_sizes(str(root), ".parquet"), manifest=other).read([0])


def _with_shards(manifest: Manifest, *shards: Shard, rows: int) -> Manifest:
    return replace(manifest, rows=rows, shards=shards, digest=content_digest(manifest.classes, shards))


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("plain", [True, False])
def test_a_row_group_of_all_images_is_read_a_few_rows_at_a_time(
    plain: bool, compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = images(20)
    table = pa.table({"image": pa.array(files, pa.binary()), "label": range(20)})
    if not plain:
        (tmp_path / "beside.png").write_bytes(files[7] or b"")
        rows = [{"bytes": image, "path": "x.png"} for image in files]
        rows[7] = {"bytes": None, "path": "beside.png"}
        table = table.set_column(0, "image", pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()})))
    pq.write_table(table, tmp_path / "train-0.parquet", row_group_size=20, compression=compression)
    remote = f"memory://{uuid.uuid4().hex}"
    for path in tmp_path.iterdir():
        storage.upload(path, f"{remote}/{path.name}")
    decode, sizes = row_groups._decoded, []

    def decoded(table: pa.Table, *more: Any) -> StoredBlock:
        sizes.append(table.num_rows)
        return decode(table, *more)

    for root in (str(tmp_path), remote):
        source = ParquetSource(storage.list_sizes(root, ".parquet"))
        whole = source._load(0)
        with monkeypatch.context() as small:
            small.setattr(row_groups, "LARGE_BYTES", 0)
            small.setattr(row_groups, "STREAM_ROWS", 3)
            small.setattr(row_groups, "_decoded", decoded)
            streamed = source._load(0)
        assert max(sizes) <= 3
        assert streamed.path == whole.path, "images stay in an uncompressed file"
        assert bool(streamed.path) == (plain and compression == "none" and root != remote)
        kept = memoryview(Path(streamed.path).read_bytes()) if streamed.path else memoryview(streamed.data or b"")
        found = [(bytes(kept[where]), label) for where, label in map(streamed.row, range(20))]
        assert found == list(zip(files, range(20), strict=True))


def test_the_store_is_told_what_is_read_of_slow_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet_set(tmp_path)
    sizes: list[int] = []
    monkeypatch.setattr(BlockStore, "get", lambda _, key, load, size=0: sizes.append(size) or load())
    files, store = storage.list_sizes(str(tmp_path), "of-00002.parquet"), BlockStore(tmp_path / "store")
    _prepared(prepared_set(tmp_path / "plain"), store).read([0])
    ParquetSource(files, store=store).read([0])
    monkeypatch.setattr(parquet, "is_on_local_disk", lambda path: False)
    distant = ParquetSource(files, store=store)
    distant.read([7])
    distant.fetch(2)
    first = pq.ParquetFile(next(iter(files))).metadata
    groups = [first.row_group(number) for number in (0, 1, 2)]
    of_groups = [sum(group.column(at).total_compressed_size for at in range(group.num_columns)) for group in groups]
    assert sizes == [0, *of_groups], "those on a local disk may stay there, unless they are compressed"
