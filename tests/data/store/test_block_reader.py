from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mimkd_ray.data.store import block_reader
from mimkd_ray.data.store.block_reader import BlockReader, read_block
from mimkd_ray.data.store.block_store import BlockStore
from mimkd_ray.data.store.stored_block import Identity, StoredBlock
from mimkd_ray.errors import DamagedDataError

ROWS = 4


def _block(number: int) -> StoredBlock:
    return StoredBlock.of([bytes([number]) * 1000] * ROWS, np.full(ROWS, number))


def _never() -> Any:
    raise AssertionError("the block was loaded again")


@pytest.fixture
def store(tmp_path: Path) -> BlockStore:
    return BlockStore(tmp_path / "blocks", 10**6)


def test_the_blocks_of_a_process_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    one = _block(0).held_bytes
    monkeypatch.setattr(block_reader, "CACHE_BYTES", int(2.5 * one))
    for number in (0, 1, 2, 1, 3):
        assert read_block(None, str(number), lambda number=number: _block(number)).labels[0] == number
    assert block_reader._blocks.bytes == 2 * one
    read_block(None, "1", _never)
    with pytest.raises(AssertionError, match="again"):
        read_block(None, "2", _never)


def test_a_forked_child_has_its_own_blocks(store: BlockStore) -> None:
    read_block(store, "a", lambda: _block(1))
    parents = block_reader._blocks
    with parents._lock:  # as if another thread were reading at the moment of the fork
        child = os.fork()
        if child == 0:
            os._exit(0 if read_block(store, "a", _never).labels[0] == 1 and block_reader._blocks is not parents else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _load_in_place(path: Path) -> StoredBlock:
    return StoredBlock(
        np.arange(ROWS), np.ones(ROWS, np.int64), np.arange(ROWS), path=str(path), identity=Identity.of(path.stat())
    )


def test_rows_are_read_again_from_a_file_that_was_written_again(store: BlockStore, tmp_path: Path) -> None:
    path = tmp_path / "set"
    path.write_bytes(b"abcd")
    for content in (b"abcd", b"efgh"):
        path.write_bytes(content)
        os.utime(path, ns=(content[0], content[0]))
        for with_store in (store, None):
            reader = BlockReader(with_store)
            assert reader.row(str(with_store), lambda: _load_in_place(path), 3) == (content[3:], 3)
            assert reader.row(str(with_store), lambda: _load_in_place(path), 0) == (content[:1], 0)


def test_a_block_removed_for_others_is_loaded_again(store: BlockStore) -> None:
    loads: list[int] = []

    def load() -> StoredBlock:
        loads.append(1)
        return _block(1)

    def read() -> None:
        assert BlockReader(store).row("a", load, 2) == (b"\1" * 1000, 1)

    read()
    store._path("a").unlink()
    read()  # it is still mapped
    assert len(loads) == 1
    block_reader._blocks = block_reader._KeptBlocks()  # as another process, which found it before it was removed
    block_reader._blocks.keep("a", _block(1).at(store._path("a")))
    read()
    assert len(loads) == 2
    read()
    assert len(loads) == 2


def test_a_file_that_was_replaced_is_mapped_anew_for_each_of_its_blocks(store: BlockStore, tmp_path: Path) -> None:
    path = tmp_path / "set"
    path.write_bytes(b"abcd")
    assert BlockReader(store).row("first", lambda: _load_in_place(path), 0)[0] == b"a"
    (tmp_path / "new").write_bytes(b"efgh")
    (tmp_path / "new").replace(path)
    store.get("second", lambda: _load_in_place(path))  # by another process
    assert BlockReader(store).row("second", _never, 1)[0] == b"f"


def test_a_file_that_never_stays_the_same(store: BlockStore, tmp_path: Path) -> None:
    def load() -> StoredBlock:
        (tmp_path / "set").write_bytes(b"abcd")
        block = _load_in_place(tmp_path / "set")
        (tmp_path / "set").write_bytes(b"ab")
        return block

    with pytest.raises(DamagedDataError, match=r"set has been written again, 3 times"):
        BlockReader(store).row("a", load, 3)


def test_use_keeps_a_block_in_the_store(store: BlockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_reader, "TOUCH_S", -1.0)
    for load in (lambda: _block(1), _never):
        assert BlockReader(store).row("a", load, 0)[1] == 1
        if load is not _never:
            os.utime(store._path("a"), ns=(1, 1))
    assert store._path("a").stat().st_mtime_ns > 1


def test_the_store_is_told_of_use_once_a_second(store: BlockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = [100.0], list[float]()
    monkeypatch.setattr(block_reader, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(store, "touch", lambda key: told.append(now[0]))
    for now[0] in (100.0, 100.5, 101.0, 101.5, 102.0, 102.75):
        read_block(store, "a", lambda: _block(1))
    assert told == [101.5, 102.75]  # when it was loaded, the store knew


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_few_files_stay_mapped(store: BlockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(f"{store.folder}/")

    monkeypatch.setattr(block_reader, "MAPPED_FILES", 2)
    reader = BlockReader(store)
    images = [reader.row(str(number), lambda number=number: _block(number), 1)[0] for number in range(10)]
    assert mapped() == 10  # all are in use
    assert images == [bytes([number]) * 1000 for number in range(10)]
    del images, reader
    assert mapped() == 2
