"""WebDataset tars in an object store: what a node keeps of their headers, and what is read of them."""

from __future__ import annotations

import errno
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from image_sets import images, tar_set, write_tar

from mimkd_ray import console, local_files, storage
from mimkd_ray.config import DataConfig
from mimkd_ray.data.sources import tar_headers
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.data.store import block_store, locks
from mimkd_ray.data.store.block_store import BlockStore, default_folder
from mimkd_ray.errors import DamagedDataError, UserError
from mimkd_ray.remote_file import RemoteFile

Reads = list[tuple[str, int]]


@pytest.fixture
def there(bucket: str, tmp_path: Path) -> str:
    """URL of a set of tars."""
    for path in tar_set(tmp_path / "set").iterdir():
        storage.upload(path, f"{bucket}/set/{path.name}")
    return f"{bucket}/set"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """(file, bytes) of each range that is read."""
    found: Reads = []
    read = RemoteFile.read

    def noted(file: RemoteFile, size: int | None = -1) -> bytes:
        data = read(file, size)
        if data:
            found.append((file.url.rpartition("/")[2], len(data)))
        return data

    monkeypatch.setattr(RemoteFile, "read", noted)
    return found


def test_headers_are_read_once(there: str, reads: Reads, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = DataConfig(root=there)
    first = open_data(config)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "set").iterdir()}
    assert sorted(reads) == sorted(sizes.items()), "each tar in one request, as it is smaller than CLOSE"
    reads.clear()
    caplog.clear()
    console.told.clear()
    second = open_data(config)
    assert reads == []
    assert "passed over: 2 other files (2 .npy)" in caplog.text
    assert (second.digest, second.train.num_rows, second.classes) == (first.digest, 16, ("0", "1", "2"))
    assert second.train.read([3]) == first.train.read([3])
    pattern = open_data(DataConfig(root=f"{there}/train-{{0..1}}.tar", holdout=0.25, split_seed=1))
    assert (pattern.train.num_rows, pattern.val.num_rows, pattern.whole.digest) == (12, 4, first.train.digest)
    reads.clear()
    assert open_data(DataConfig(root=there, labels="none")).train.labels().tolist() == first.train.labels().tolist()
    assert len(reads) == 3, "what is refused where all images need a label is taken here"
    reads.clear()
    open_data(DataConfig(root=there, store_gb=0))
    open_data(DataConfig(root=there, store_gb=0))
    assert len(reads) == 6, "without a store nothing is kept"


def test_a_tar_that_is_written_again_is_read_again(there: str, reads: Reads, tmp_path: Path) -> None:
    config = DataConfig(root=there)
    before = open_data(config).train.read(range(16))
    reads.clear()
    whole = images(8, 8)
    files = {f"{8 + at:04d}.jpg": whole[7 - at] or b"" for at in range(8)}
    labels = {name.replace("jpg", "cls"): b"2" for name in files}
    write_tar(tmp_path / "again.tar", dict(sorted((files | labels).items())))
    storage.upload(tmp_path / "again.tar", f"{there}/train-1.tar")
    opened = open_data(config)
    assert {name for name, _ in reads} == {"train-1.tar"}
    rows = opened.train.read(range(16))
    kept = [row for row in rows if "train-0" in row.name]
    assert [(row.name, row.label, bytes(row.image)) for row in kept] == [
        (row.name, row.label, bytes(row.image)) for row in before if "train-0" in row.name
    ]
    found = {row.name.rpartition("/")[2]: (bytes(row.image), row.label) for row in rows if "train-1" in row.name}
    assert found == {name: (image, 2) for name, image in files.items()}


@pytest.mark.parametrize("first", [0, 3])
def test_a_tar_that_is_written_again_while_in_use_is_not_trained_on(there: str, first: int, tmp_path: Path) -> None:
    """Its blocks were kept under the key of the old ones. The new tar is as long as the old one, or shorter."""
    opened = open_data(DataConfig(root=there))
    number, offset, length = opened.train._places[0].tolist()
    old = (tmp_path / "set" / f"train-{number}.tar").read_bytes()
    storage.write_bytes(f"{there}/train-{number}.tar", bytes(first or len(old)))
    with pytest.raises(
        DamagedDataError, match=rf"train-{number}\.tar: the tar was written again .*give the same command"
    ):
        opened.train.read([0])
    assert not list(default_folder().glob("*.block"))
    storage.write_bytes(f"{there}/train-{number}.tar", old)
    assert opened.train.read([0])[0].image == old[offset : offset + length]


def test_a_damaged_note_is_made_anew(there: str, reads: Reads, caplog: pytest.LogCaptureFixture) -> None:
    open_data(DataConfig(root=there))
    notes = sorted(default_folder().glob("*.note"))
    assert len(notes) == 3
    notes[0].write_bytes(notes[0].read_bytes()[:-1])
    reads.clear()
    assert open_data(DataConfig(root=there)).train.num_rows == 16
    assert len(reads) == 1
    assert "is damaged" in caplog.text
    assert not list(default_folder().glob(".*.tmp"))
    reads.clear()
    open_data(DataConfig(root=there))
    assert reads == []


def test_notes_stay_where_blocks_make_room(tmp_path: Path) -> None:
    store = BlockStore(tmp_path / "store", max_bytes=1)
    assert store.note("a", lambda: b"of a", "a") == b"of a"
    store._evict(0, give_up_half=True)
    assert store.note("a", lambda: b"other", "a") == b"of a"
    with pytest.raises(UserError, match="of make"):
        store.note("b", _fail, "b")
    assert store.note("b", lambda: b"of b", "b") == b"of b"


def test_what_nobody_uses_is_removed_by_age(tmp_path: Path) -> None:
    store = BlockStore(tmp_path / "store")
    for name in "abc":
        store.note(name, name.encode, name)
    (of_a, of_b, of_c) = (store.folder / f"{block_store._name(name)}.note" for name in "abc")
    assert {path.name for path in store.folder.glob("*note*")} == {of_a.name, of_b.name, of_c.name}, "no lock stays"
    left = store.folder / f".{of_a.name}.1-0a.tmp"
    left.write_bytes(b"half")
    for path, days in ((of_a, 31), (of_b, 31), (of_c, 29), (left, 2)):
        os.utime(path, (time.time() - days * 86400,) * 2)
    store.note("a", _fail, "a")
    store._evict(0, give_up_half=True)
    assert sorted(store.folder.glob(".*")) == []
    assert {path.name for path in store.folder.glob("*.note")} == {of_a.name, of_c.name}


def _fail() -> bytes:
    raise UserError("an error of make")


def test_threads_wait_for_their_own_notes_and_say_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "TELL_SECONDS", 0.05)
    monkeypatch.setattr(block_store, "NOTE_SECONDS", 0.1)
    store = BlockStore(tmp_path / "store")
    keys = [str(number) for number in range(60)]  # of 256 locks several would be shared
    made: list[str] = []

    def slowly(key: str) -> bytes:
        time.sleep(0.5)
        made.append(key)
        return key.encode()

    def read(key: str) -> bytes:
        return store.note(key, lambda: slowly(key), f"headers of {key}.tar", 20 * block_store.SLOW_BYTES)

    with ThreadPoolExecutor(len(keys)) as pool:
        assert list(pool.map(read, keys)) == [key.encode() for key in keys]
    assert not caplog.records
    for key in keys:
        (store.folder / f"{block_store._name(key)}.note").unlink()
    made.clear()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, "01230123")) == [key.encode() for key in "01230123"]
    assert sorted(made) == list("0123"), "longer than NOTE_SECONDS, as the files are large"
    (record,) = caplog.records
    said = r"another process reads headers of [0-3]\.tar: waiting for what it finds, for at most 20 s a file"
    assert re.fullmatch(said, record.getMessage())


def test_a_note_that_nobody_finishes_is_made_by_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(block_store, "NOTE_SECONDS", 0.1)
    store = BlockStore(tmp_path / "store")
    store.prepare()
    with ExitStack() as held:
        for key in "ab":
            held.enter_context(locks.locked(store.folder / f"{block_store._name(key)}.note-lock"))
        assert [store.note(key, key.encode, f"headers of {key}.tar") for key in "ab"] == [b"a", b"b"]
    assert len(caplog.records) == 1
    assert "until then each process reads by itself what is kept there, such as headers of a.tar" in caplog.text


def test_notes_that_do_not_fit_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, fill: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(local_files, "publish", full)
    store = BlockStore(tmp_path / "store")
    assert [store.note(key, key.encode, f"headers of {key}.tar") for key in "ab"] == [b"a", b"b"]
    (record,) = caplog.records
    for part in ("No space left", "--data.store; until then each process reads by itself", "headers of a.tar"):
        assert part in record.getMessage()


class _Heard:
    """A console that keeps what it is told."""

    every = 0.0

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int, str]] = []

    def line(self, text: str) -> None:
        """Nothing is said."""
        raise AssertionError(text)

    def status(self, status: console.Status | None) -> None:
        """Keep it."""
        if status is not None:
            self.told.append((status.what, status.done, status.total, status.unit))


def test_progress_is_told(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", {"0.jpg": bytes(3_000_000), "0.cls": b"0"})
    heard = _Heard()
    before = console.use(heard)
    try:
        tar_headers.headers(storage.list_entries(str(tmp_path), ".tar"))
    finally:
        console.use(before)
    what = "reading the headers of 1 tar"
    assert heard.told[0] == (what, 0, 4, "MB"), "3,010,560 bytes, rounded up"
    assert (what, 3, 4, "MB") in heard.told


def test_progress_counts_tars_whose_headers_are_known(there: str, tmp_path: Path) -> None:
    store, tars = BlockStore(tmp_path / "store"), storage.list_entries(there, ".tar")
    url, entry = next(iter(tars.items()))
    for _ in range(2):
        passed: list[int] = []
        tar_headers._listed(url, entry, True, store, passed.append)
        assert sum(passed) == entry.size
    assert passed == [entry.size]
