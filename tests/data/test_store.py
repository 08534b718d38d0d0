from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mimkd_ray.data import store as module
from mimkd_ray.data.store import BlockStore, default_folder, read_block
from mimkd_ray.errors import UserError


def _table(number: int, size: int = 1000) -> pa.Table:
    return pa.table({"image": pa.array([bytes([number]) * size] * 4, pa.binary()), "label": pa.array([number] * 4)})


def _never() -> Any:
    raise AssertionError("the block was loaded again")


def _files(store: BlockStore) -> int:
    return len(list(store.folder.glob("*.arrow")))


@pytest.fixture
def store(tmp_path: Path) -> BlockStore:
    return BlockStore(tmp_path / "blocks", 10**6)


def test_a_block_is_loaded_once(store: BlockStore) -> None:
    assert store.get("a", lambda: _table(1)).equals(_table(1))
    assert store.get("a", _never).equals(_table(1))
    other = pickle.loads(pickle.dumps(store))  # noqa: S301
    assert other.get("a", _never).equals(_table(1))
    assert store.get("b", lambda: _table(2)).equals(_table(2))
    assert store.fetch("c", lambda: _table(3))
    assert store.fetch("c", _never)
    assert not list(store.folder.glob("*.part"))
    assert store.folder.stat().st_mode & 0o777 == 0o700


def test_the_table_is_mapped(store: BlockStore) -> None:
    before = pa.total_allocated_bytes()
    table = store.get("a", lambda: _table(1, 100_000))
    assert pa.total_allocated_bytes() - before < 10_000
    assert table.nbytes > 400_000


def _load_slowly(folder: Path, log: Path, key: str) -> None:
    def load() -> pa.Table:
        with open(log, "a") as out:
            out.write(key + "\n")
        time.sleep(0.3)
        return _table(7)

    assert BlockStore(folder, 10**6).get(key, load).equals(_table(7))


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


def test_a_failed_load_leaves_nothing_behind(store: BlockStore) -> None:
    def fail() -> Any:
        raise UserError("no")

    for _ in range(2):
        with pytest.raises(UserError, match="no"):
            store.get("a", fail)
    assert _files(store) == 0
    assert store.get("a", lambda: _table(1)).equals(_table(1))


def test_the_least_recently_used_goes(tmp_path: Path) -> None:
    one = _table(1, 100_000).nbytes + module.HEADER_BYTES
    store = BlockStore(tmp_path, 4 * one)
    tables = {}
    for number, key in enumerate("abcd"):
        tables[key] = store.get(key, lambda number=number: _table(number, 100_000))
        os.utime(store._path(key), ns=(number, number))
    store.get("a", _never)  # used just now
    store.get("e", lambda: _table(4, 100_000))
    assert store._path("a").exists()
    assert not store._path("b").exists()
    assert tables["b"].equals(_table(1, 100_000))  # mapped: still readable
    for number in range(5, 30):
        store.get(str(number), lambda number=number: _table(number, 100_000))
        assert sum(f.stat().st_size for f in store.folder.glob("*.arrow")) <= store.max_bytes


def test_the_bound_holds_for_a_folder_found_full(tmp_path: Path) -> None:
    large = BlockStore(tmp_path, 10**6)
    for number in range(40):
        large.get(str(number), lambda number=number: _table(number))
    small = BlockStore(tmp_path, 50_000)
    small.get("new", lambda: _table(1))
    assert sum(f.stat().st_size for f in tmp_path.glob("*.arrow")) <= 50_000
    assert small._path("new").exists()


@pytest.mark.parametrize("left", [0, 7, 300, 0.5, 0.99])
def test_a_file_cut_short_is_fetched_anew(store: BlockStore, left: float, caplog: pytest.LogCaptureFixture) -> None:
    store.get("a", lambda: _table(1))
    path = store._path("a")
    size = path.stat().st_size
    os.truncate(path, int(left * size) if isinstance(left, float) else left)
    assert store.get("a", lambda: _table(2)).equals(_table(2))
    assert "is damaged" in caplog.text
    assert store.get("a", _never).equals(_table(2))


def test_offsets_that_point_nowhere_are_found(store: BlockStore) -> None:
    store.get("a", lambda: _table(1))
    path = store._path("a")
    data = path.read_bytes()
    offset = (2000).to_bytes(4, "little")  # where the third of four images begins
    assert data.count(offset) == 1
    path.write_bytes(data.replace(offset, (0x7FFFFFF0).to_bytes(4, "little")))
    assert store.get("a", lambda: _table(2)).equals(_table(2))


def _full(store: BlockStore, monkeypatch: pytest.MonkeyPatch, room: int) -> list[int]:
    """From now on the disk has room for `room` files of the store."""
    tried = []
    write = module._write

    def limited(path: Path, table: pa.Table) -> None:
        tried.append(_files(store))
        if _files(store) >= room:
            path.write_bytes(b"the beginning")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, table)

    monkeypatch.setattr(module, "_write", limited)
    return tried


def test_a_full_disk_makes_the_store_give_up_half(store: BlockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = _full(store, monkeypatch, room=4)
    for number in range(5):
        store.get(str(number), lambda number=number: _table(number))
    assert tried == [0, 1, 2, 3, 4, 2]
    assert _files(store) == 3


def test_a_disk_without_any_room(
    store: BlockStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _full(store, monkeypatch, room=0)
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            assert store.get(str(number), lambda number=number: _table(number)).equals(_table(number))
    assert len(caplog.records) == 1
    for part in (str(store.folder), "No space left", "MB free", "--data.store", "--data.store-gb"):
        assert part in caplog.text
    assert not store.fetch("x", lambda: _table(1))
    assert not list(store.folder.glob("*.part"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_the_error_of_a_full_device_is_recognised(store: BlockStore) -> None:
    store.get("a", lambda: _table(1))
    os.symlink("/dev/full", store.folder / f"{module._name('b')}.part")
    assert store.get("b", lambda: _table(2)).equals(_table(2))
    assert store._path("b").exists()  # the second try, after the link was removed
    assert not store._path("a").exists()  # given up in between


def test_a_block_larger_than_the_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = BlockStore(tmp_path, 3000)
    assert store.get("a", lambda: _table(1)).equals(_table(1))
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
    store.get("a", lambda: _table(1))
    shutil.rmtree(store.folder)
    assert store.get("a", lambda: _table(2)).equals(_table(2))
    shutil.rmtree(store.folder)
    assert store.fetch("a", lambda: _table(2))
    assert store.get("a", _never).equals(_table(2))


def test_the_default_folder_is_this_users() -> None:
    assert default_folder().name.endswith(str(os.getuid()))
    assert BlockStore().folder == default_folder()


def test_the_tables_of_a_process_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_tables", module._Tables())
    one = _table(0).nbytes
    monkeypatch.setattr(module, "CACHE_BYTES", int(2.5 * one))
    for number in (0, 1, 2, 1, 3):
        assert read_block(None, str(number), lambda number=number: _table(number)).equals(_table(number))
    assert module._tables.bytes == 2 * one
    read_block(None, "1", _never)
    with pytest.raises(AssertionError, match="again"):
        read_block(None, "2", _never)


def test_a_forked_child_has_its_own_tables(store: BlockStore) -> None:
    read_block(store, "a", lambda: _table(1))
    parents = module._tables
    with parents._lock:  # as if another thread were reading at the moment of the fork
        child = os.fork()
        if child == 0:
            os._exit(0 if read_block(store, "a", _never).equals(_table(1)) and module._tables is not parents else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
