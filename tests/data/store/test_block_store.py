from __future__ import annotations

import copy
import errno
import logging
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mimkd_ray.data.store import block_store as module
from mimkd_ray.data.store import locks
from mimkd_ray.data.store.block_store import BlockStore, default_folder
from mimkd_ray.data.store.stored_block import StoredBlock
from mimkd_ray.errors import UserError

ROWS = 4


def _block(number: int, size: int = 1000) -> StoredBlock:
    return StoredBlock.of([bytes([number]) * size] * ROWS, np.full(ROWS, number))


def _noted(waits: list[float]) -> Callable[[float], None]:
    """A `time.sleep` that keeps what it was asked for."""

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        time.sleep(seconds)

    return sleep


def _is(block: StoredBlock, number: int, size: int = 1000) -> bool:
    images = block.images(lambda path, identity: memoryview(Path(path).read_bytes()))
    found = [bytes(images[o : o + n]) for o, n in zip(block.offsets, block.lengths, strict=True)]
    return found == [bytes([number]) * size] * ROWS and block.labels.tolist() == [number] * ROWS


def _never() -> Any:
    raise AssertionError("the block was loaded again")


def _files(store: BlockStore) -> int:
    return len(list(store.folder.glob("*.block")))


@pytest.fixture
def store(tmp_path: Path) -> BlockStore:
    return BlockStore(tmp_path / "blocks", 10**6)


def test_a_block_is_loaded_once(store: BlockStore) -> None:
    assert _is(store.get("a", lambda: _block(1)), 1)
    assert _is(store.get("a", _never), 1)
    other = pickle.loads(pickle.dumps(store))  # noqa: S301
    assert _is(other.get("a", _never), 1)
    assert _is(store.get("b", lambda: _block(2)), 2)
    assert store.fetch("c", lambda: _block(3))
    assert store.fetch("c", _never)
    assert not list(store.folder.glob("*.part"))
    assert store.folder.stat().st_mode & 0o777 == 0o700


def test_the_images_are_in_the_file(store: BlockStore) -> None:
    block = store.get("a", lambda: _block(1, 100_000))
    assert block.held_bytes < 1000
    assert store._path("a").stat().st_size > 400_000


def _load_slowly(folder: Path, log: Path, key: str) -> None:
    def load() -> StoredBlock:
        with open(log, "a") as out:
            out.write(key + "\n")
        time.sleep(0.3)
        return _block(7)

    assert _is(BlockStore(folder, 10**6).get(key, load), 7)


def test_of_many_processes_one_loads(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    children = [
        context.Process(target=_load_slowly, args=(tmp_path / "blocks", log, key)) for key in ("a", "b") for _ in "123"
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0] * 6
    assert sorted(log.read_text().split()) == ["a", "b"]


def test_a_lock_that_is_not_given_back_is_waited_for_once(
    store: BlockStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, seconds in (("TELL_SECONDS", 0.1), ("LOCK_SECONDS", 0.3)):
        monkeypatch.setattr(locks, name, seconds)
    store.prepare()
    lock = store.folder / f"lock-{int(module._name('a')[:4], 16) % module.LOCKS}"
    for held in (lock, store.folder / "usage"):  # while another process makes the block, and while it counts it
        caplog.clear()
        with locks.locked(held):
            waits: list[float] = []
            with monkeypatch.context() as patch:
                patch.setattr(locks, "time", SimpleNamespace(monotonic=time.monotonic, sleep=_noted(waits)))
                assert _is(store.get("a", lambda: _block(1)), 1)
                assert waits
                waits.clear()
                assert _is(store.get("a", lambda: _block(1)), 1)
                assert not waits, "once given up, it is not waited for again"
        assert not store.touch("a")
        assert caplog.text.count(f"waiting for {held}, which another process holds, for at most 0.3 s") == 1
        assert f"holds {held} for longer than 0.3 s" in caplog.text
        assert "each process reads blocks by itself" in caplog.text
        store._warned = False
    assert _is(store.get("a", lambda: _block(1)), 1)
    assert store.touch("a")


def test_a_large_block_of_slow_storage_is_waited_for(
    store: BlockStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, seconds in (("TELL_SECONDS", 0.1), ("LOCK_SECONDS", 0.1)):
        monkeypatch.setattr(locks, name, seconds)
    made: list[int] = []

    def make() -> Any:
        time.sleep(0.5)
        made.append(1)
        return _block(1)

    with ThreadPoolExecutor(2) as pool:
        assert all(
            _is(block, 1) for block in pool.map(lambda _: store.get("a", make, 20 * module.SLOW_BYTES), range(2))
        )
        assert made == [1], "the other one has waited"
        assert "for at most 20 s" in caplog.text
        assert all(_is(block, 1) for block in pool.map(lambda _: store.get("b", make), range(2)))
    assert made == [1, 1, 1], "other blocks are waited for as long as ever"


def test_a_failed_load_leaves_nothing_behind(store: BlockStore) -> None:
    def fail() -> Any:
        raise UserError("no")

    for _ in range(2):
        with pytest.raises(UserError, match="no"):
            store.get("a", fail)
    assert _files(store) == 0
    assert _is(store.get("a", lambda: _block(1)), 1)


def test_the_least_recently_used_goes(tmp_path: Path) -> None:
    one = _block(1, 100_000).file_bytes()
    store = BlockStore(tmp_path, 4 * one)
    for number, key in enumerate("abcd"):
        store.get(key, lambda number=number: _block(number, 100_000))
        os.utime(store._path(key), ns=(number, number))
    store.get("a", _never)  # used just now
    store.get("e", lambda: _block(4, 100_000))
    assert store._path("a").exists()
    assert not store._path("b").exists()
    for number in range(5, 30):
        store.get(str(number), lambda number=number: _block(number, 100_000))
        assert sum(f.stat().st_size for f in store.folder.glob("*.block")) <= store.max_bytes


def test_the_bound_holds_for_a_folder_found_full(tmp_path: Path) -> None:
    large = BlockStore(tmp_path, 10**6)
    for number in range(40):
        large.get(str(number), lambda number=number: _block(number))
    small = BlockStore(tmp_path, 50_000)
    small.get("new", lambda: _block(1))
    assert sum(f.stat().st_size for f in tmp_path.glob("*.block")) <= 50_000
    assert small._path("new").exists()


@pytest.mark.parametrize("left", [0, 7, 300, 0.5, 0.99])
def test_a_file_cut_short_is_fetched_anew(store: BlockStore, left: float, caplog: pytest.LogCaptureFixture) -> None:
    store.get("a", lambda: _block(1))
    path = store._path("a")
    size = path.stat().st_size
    os.truncate(path, int(left * size) if isinstance(left, float) else left)
    assert _is(store.get("a", lambda: _block(2)), 2)
    assert "is damaged" in caplog.text
    assert _is(store.get("a", _never), 2)


def test_after_a_restart_of_the_machine_it_begins_anew(
    store: BlockStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are not flushed to disk: what a power cut left of them is not to be trusted."""
    monkeypatch.setattr(module, "BOOT_ID", tmp_path / "boot_id")
    (tmp_path / "boot_id").write_text("one\n")
    store.get("a", lambda: _block(1))
    assert _is(BlockStore(store.folder).get("a", _never), 1)
    (tmp_path / "boot_id").write_text("two\n")
    assert _is(BlockStore(store.folder).get("a", lambda: _block(2)), 2)
    assert _is(BlockStore(store.folder).get("a", _never), 2)


def test_without_the_name_of_a_start_blocks_are_flushed(
    store: BlockStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    store.get("a", lambda: _block(1))
    assert not flushed
    monkeypatch.setattr(module, "BOOT_ID", tmp_path / "none")
    store.get("b", lambda: _block(1))
    assert len(flushed) == 1
    assert _is(BlockStore(store.folder).get("a", _never), 1)


def _full(store: BlockStore, monkeypatch: pytest.MonkeyPatch, room: int) -> list[int]:
    """From now on the disk has room for `room` files of the store."""
    tried = []
    write = StoredBlock.write

    def limited(block: StoredBlock, path: Path, durable: bool) -> None:
        tried.append(_files(store))
        if _files(store) >= room:
            path.write_bytes(b"the beginning")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(block, path, durable)

    monkeypatch.setattr(StoredBlock, "write", limited)
    return tried


def test_a_full_disk_makes_the_store_give_up_half(store: BlockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = _full(store, monkeypatch, room=4)
    for number in range(5):
        store.get(str(number), lambda number=number: _block(number))
    assert tried == [0, 1, 2, 3, 4, 2]
    assert _files(store) == 3


def test_a_disk_without_any_room(
    store: BlockStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _full(store, monkeypatch, room=0)
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            assert _is(store.get(str(number), lambda number=number: _block(number)), number)
    assert len(caplog.records) == 1
    for part in (str(store.folder), "No space left", "MB free", "--data.store", "--data.store-gb"):
        assert part in caplog.text
    assert not store.fetch("x", lambda: _block(1))
    assert not list(store.folder.glob("*.part"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_the_error_of_a_full_device_is_recognised(store: BlockStore) -> None:
    store.get("a", lambda: _block(1))
    os.symlink("/dev/full", store.folder / f"{module._name('b')}.part")
    assert _is(store.get("b", lambda: _block(2)), 2)
    assert store._path("b").exists()  # the second try, after the link was removed
    assert not store._path("a").exists()  # given up in between


def test_a_block_larger_than_the_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = BlockStore(tmp_path, 3000)
    assert _is(store.get("a", lambda: _block(1)), 1)
    assert "larger than the store" in caplog.text


def test_a_folder_of_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "blocks"
    folder.mkdir(mode=0o700)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
        with pytest.raises(UserError, match=r"belongs to user .* --data\.store"):
            BlockStore(folder).get("a", _never)
    folder.chmod(0o777)
    with pytest.raises(UserError, match=r"written by others \(mode 777\)"):
        BlockStore(folder).get("a", _never)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(UserError, match="is a link"):
        BlockStore(tmp_path / "link").get("a", _never)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        BlockStore(tmp_path / "file" / "x").get("a", _never)


def test_a_folder_that_is_cleaned_away_is_made_again(store: BlockStore) -> None:
    store.get("a", lambda: _block(1))
    shutil.rmtree(store.folder)
    assert _is(store.get("a", lambda: _block(2)), 2)
    shutil.rmtree(store.folder)
    assert store.fetch("a", lambda: _block(2))
    assert _is(store.get("a", _never), 2)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOSPC])
def test_a_file_system_without_locks_or_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fails(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    if number == errno.ENOSYS:
        monkeypatch.setattr(locks.fcntl, "flock", fails)
    else:
        monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(UserError, match=f"{os.strerror(number)}; choose another folder with --data.store, or none"):
        BlockStore(tmp_path / "store").prepare()


def test_the_default_folder_is_this_users() -> None:
    assert default_folder().name.endswith(str(os.getuid()))
    assert BlockStore().folder == default_folder()


def _fetch_in_child(store: BlockStore, keys: str) -> None:
    for key in keys:
        store.fetch(key, lambda: _block(1))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_hits_of_the_processes_that_fetch_are_counted_where_training_runs(store: BlockStore, method: str) -> None:
    assert store.hit_rate() is None
    child = multiprocessing.get_context(method).Process(target=_fetch_in_child, args=(store, "abca"))
    child.start()
    child.join()
    assert store.hit_rate() == 1 / 4
    elsewhere = copy.copy(store)
    assert elsewhere.hit_rate() is None, "another machine counts for itself"
    store.fetch("b", _never)
    assert store.hit_rate() == 2 / 5


def test_a_count_that_a_power_cut_left_as_zero_bytes(store: BlockStore) -> None:
    store.prepare()
    (store.folder / "usage").write_bytes(bytes(32))
    assert _is(store.get("a", lambda: _block(1)), 1)
    assert int((store.folder / "usage").read_bytes()) == (store.folder / f"{module._name('a')}.block").stat().st_size
