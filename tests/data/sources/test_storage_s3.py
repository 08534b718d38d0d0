"""Storage functions and Parquet against an S3 server."""

from __future__ import annotations

import errno
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import folder_set, parquet_set, prepared_set, tar_set

from mimkd_ray import remote_filesystem, retries, storage
from mimkd_ray.config import DataConfig
from mimkd_ray.data.loading.loader import eval_batches, train_batches
from mimkd_ray.data.order.sample_order import Order
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.data.store import block_reader, block_store
from mimkd_ray.errors import DamagedDataError, UserError


def test_storage_functions(bucket: str, tmp_path: Path) -> None:
    folder = storage.join(bucket, "runs/a")
    assert not storage.exists(folder)
    assert storage.list_files(folder) == []
    for name in ("b.bin", "a.bin", "sub/c.bin"):
        storage.write_bytes(storage.join(folder, name), name.encode())
    assert storage.exists(folder)
    assert storage.list_files(folder, ".bin") == [f"{folder}/a.bin", f"{folder}/b.bin"]
    assert storage.list_dirs(folder) == [f"{folder}/sub"]
    assert storage.list_dirs(bucket) == [f"{bucket}/runs"]
    assert storage.read_bytes(f"{folder}/a.bin") == b"a.bin"
    with pytest.raises(FileNotFoundError, match="nothing"):
        storage.read_bytes(f"{folder}/nothing")
    storage.write_bytes(f"{folder}/a.bin", b"longer than before")
    assert storage.size(f"{folder}/a.bin") == 18
    (tmp_path / "up.bin").write_bytes(bytes(100_000))
    storage.upload(tmp_path / "up.bin", f"{folder}/up.bin")
    assert storage.list_sizes(folder, "up.bin") == {f"{folder}/up.bin": 100_000}
    storage.remove_tree(folder)
    assert not storage.exists(folder)
    storage.remove_tree(folder)


def test_create_once(bucket: str) -> None:
    url = f"{bucket}/x/once.json"
    assert storage.create_once(url, b"first")
    assert not storage.create_once(url, b"second")
    assert storage.read_bytes(url) == b"first"
    with ThreadPoolExecutor(8) as pool:
        for number in range(10):
            place = f"{bucket}/race/{number}"
            won = list(pool.map(partial(storage.create_once, place), [bytes([rank]) for rank in range(8)]))
            assert sum(won) == 1
            assert storage.read_bytes(place) == bytes([won.index(True)])


def test_create_once_whose_first_answer_was_lost(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = remote_filesystem.filesystem(bucket)
    put = fs.pipe_file
    lost = [ConnectionResetError("the answer was lost")]

    def put_and_lose_the_answer(*args: Any, **options: Any) -> None:
        put(*args, **options)
        if lost:
            raise lost.pop()

    monkeypatch.setattr(fs, "pipe_file", put_and_lose_the_answer)
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.0)
    assert storage.create_once(f"{bucket}/x", b"ours")
    assert not lost
    monkeypatch.setattr(fs, "pipe_file", put)
    assert not storage.create_once(f"{bucket}/x", b"ours"), "the same bytes, but another's"


def test_create_once_on_a_store_that_does_not_name_the_condition(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ceph and MinIO may answer: status 412 is all there is, which s3fs takes for an invalid argument."""
    from botocore.exceptions import ClientError

    storage.write_bytes(f"{bucket}/x", b"another's")

    def refuse(*args: Any, **options: Any) -> None:
        answer = {"Error": {"Code": "PreconditionFailed"}, "ResponseMetadata": {"HTTPStatusCode": 412}}
        raise OSError(errno.EINVAL, "PreconditionFailed") from ClientError(answer, "PutObject")

    monkeypatch.setattr(remote_filesystem.filesystem(bucket), "pipe_file", refuse)
    assert not storage.create_once(f"{bucket}/x", b"ours")


def test_folder_marker_is_no_file(bucket: str) -> None:
    import boto3

    boto3.client("s3").put_object(Bucket=bucket.removeprefix("s3://"), Key="x/", Body=b"")
    storage.write_bytes(f"{bucket}/x/a", b"1")
    assert storage.list_files(f"{bucket}/x") == [f"{bucket}/x/a"]


def test_changes_by_others_are_seen(bucket: str) -> None:
    import boto3

    storage.write_bytes(f"{bucket}/x/a", b"1")
    assert len(storage.list_files(f"{bucket}/x")) == 1
    boto3.client("s3").put_object(Bucket=bucket.removeprefix("s3://"), Key="x/b", Body=b"22")
    assert storage.list_sizes(f"{bucket}/x") == {f"{bucket}/x/a": 1, f"{bucket}/x/b": 2}
    assert storage.exists(f"{bucket}/x/b")


def test_missing_bucket(bucket: str) -> None:
    nowhere = "s3://no-such-bucket-here/x"
    calls: list[Callable[[], object]] = [
        partial(storage.list_files, nowhere),
        partial(storage.exists, nowhere),
        partial(storage.read_bytes, nowhere),
        partial(storage.write_bytes, nowhere, b"x"),
        partial(storage.create_once, nowhere, b"x"),
        partial(open_data, DataConfig(root=nowhere)),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"there is no bucket s3://no-such-bucket-here at http.*aws s3 mb"):
            call()


def test_reader_survives_pickling(bucket: str) -> None:
    storage.write_bytes(f"{bucket}/x", bytes(range(100)))
    file = pickle.loads(pickle.dumps(storage.open_file(f"{bucket}/x")))  # noqa: S301
    file.seek(90)
    assert file.read() == bytes(range(90, 100))


def _read_in_child(url: str, queue: Any) -> None:
    queue.put(storage.read_bytes(url))


def test_read_after_fork(bucket: str) -> None:
    storage.write_bytes(f"{bucket}/x", b"shared")  # the parent's event loop runs from here on
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(f"{bucket}/x", queue))
    child.start()
    assert queue.get(timeout=30) == b"shared"
    child.join(30)
    assert child.exitcode == 0
    assert storage.read_bytes(f"{bucket}/x") == b"shared"


NONE = DataConfig(pipeline="none", image_size=8, views=1, loader_workers=2)
LAYOUTS = {"parquet": parquet_set, "folders": folder_set, "prepared": prepared_set, "tars": tar_set}


def _upload(local: Path, url: str) -> None:
    for path in sorted(p for p in local.rglob("*") if p.is_file()):
        storage.upload(path, storage.join(url, str(path.relative_to(local))))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_set(bucket: str, tmp_path: Path, layout: str) -> None:
    local = LAYOUTS[layout](tmp_path / "set")
    _upload(local, f"{bucket}/set")
    there = open_data(DataConfig(root=f"{bucket}/set"))
    here = open_data(DataConfig(root=str(local)))
    assert there.digest == here.digest
    ids = [5, 0, 11, 3]
    assert [r[:3] for r in there.train.read(ids)] == [r[:3] for r in here.train.read(ids)]
    np.testing.assert_array_equal(there.train.labels(), here.train.labels())
    # Loader processes are forked from a process that has talked to the store.
    batches = list(eval_batches(there.val, NONE, 4))
    assert sum(len(b) for b in batches) == here.val.num_rows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_reads_each_block_once(
    bucket: str, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _upload(LAYOUTS[layout](tmp_path / "set"), f"{bucket}/set")
    data = open_data(DataConfig(root=f"{bucket}/set"))
    order = Order(data.train.blocks, 2, 3, seed=1, window=2)
    options: dict[str, Any] = {"lanes": [0, 1], "start_step": 0, "stop_step": 12}
    there = list(train_batches(data.train, NONE, order, 1, **options))
    assert len(there) == 24
    # From here on the blocks are in this node's store: no request is made any more.
    monkeypatch.setattr(block_reader, "_blocks", block_reader._KeptBlocks())
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    again = list(train_batches(data.train, replace(NONE, loader_workers=0), order, 1, **options))
    for a, b in zip(there, again, strict=True):
        assert torch.equal(a.ids_B, b.ids_B)
        assert torch.equal(a.images_BCHW, b.images_BCHW)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_object_that_goes_away(bucket: str, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _upload(LAYOUTS[layout](tmp_path / "set"), f"{bucket}/set")
    train = open_data(DataConfig(root=f"{bucket}/set")).train
    first = train.read([0])[0].name if layout in ("folders", "tars") else storage.list_files(f"{bucket}/set")[0]
    storage.remove_tree(first.partition("/0")[0])
    monkeypatch.setattr(block_reader, "_blocks", block_reader._KeptBlocks())
    storage.remove_tree(str(block_store.default_folder()))
    with pytest.raises(DamagedDataError, match=f"{first} is gone"):
        train.read([0])


def test_an_object_that_is_written_again_is_read_again(bucket: str, tmp_path: Path) -> None:
    _upload(folder_set(tmp_path / "set"), f"{bucket}/set")
    row = open_data(DataConfig(root=f"{bucket}/set")).train.read([0])[0]
    storage.write_bytes(row.name, b"x" * len(row.image))
    assert open_data(DataConfig(root=f"{bucket}/set")).train.read([0])[0].image == b"x" * len(row.image)


def test_a_damaged_object_is_not_trained_on(bucket: str, tmp_path: Path) -> None:
    root = prepared_set(tmp_path / "set")
    _upload(root, f"{bucket}/set")
    shard = "train-00000-of-00003.parquet"
    data = bytearray((root / shard).read_bytes())
    data[20] ^= 1
    storage.write_bytes(f"{bucket}/set/{shard}", bytes(data))
    train = open_data(DataConfig(root=f"{bucket}/set")).train
    with pytest.raises(DamagedDataError, match=rf"{shard}: row group 0 is damaged"):
        train.read([0])
    assert train.read([5])[0].id == 5


@pytest.mark.parametrize("name", ["lr[0]", "lr*", "lr?", "lr[!x]", "a#b", "a%41", "é ü"])
def test_a_tree_is_removed_by_its_name_and_not_by_a_pattern(bucket: str, name: str) -> None:
    """`lr[0]` as a pattern matches `lr0`: somebody else's run was removed, and the own one stayed."""
    for other in (name, "lr0", "lrx", "lr", "lr[0]9", "aAb", "aA"):
        for file in ("config.json", "checkpoints/step_1/state.pt"):
            storage.write_bytes(f"{bucket}/{other}/{file}", b"x")
    folder = f"{bucket.removeprefix('s3://')}/{name}/empty/"
    remote_filesystem.filesystem(bucket).pipe_file(folder, b"")  # marks a folder
    assert storage.list_tree(f"{bucket}/{name}") == ["checkpoints/step_1/state.pt", "config.json", "empty/"]
    before = set(storage.list_dirs(bucket))
    storage.remove_tree(f"{bucket}/{name}")
    assert before - set(storage.list_dirs(bucket)) == {f"{bucket}/{name}"}
    storage.remove_file(f"{bucket}/lr0/config.json")
    storage.remove_file(f"{bucket}/lr0/config.json")
    assert storage.list_tree(f"{bucket}/lr0") == ["checkpoints/step_1/state.pt"]


@pytest.mark.parametrize("place", ["/..", "/x/..", "//", "/./"])
def test_what_may_be_a_whole_bucket_is_not_removed(bucket: str, place: str) -> None:
    with pytest.raises(UserError, match="whole bucket"):
        storage.remove_tree(f"{bucket}{place}")
