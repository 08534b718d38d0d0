from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import prepared_set

from mimkd_ray import storage
from mimkd_ray.config import DataConfig
from mimkd_ray.data.loading import cpu_quota
from mimkd_ray.data.loading.loader import train_batches
from mimkd_ray.data.loading.read_ahead import Distance, ReadAhead, distance
from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.data.order.sample_order import Order
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.data.sources.digits import DigitsSource
from mimkd_ray.data.sources.parquet import ParquetSource
from mimkd_ray.data.store.block_store import BlockStore
from mimkd_ray.errors import DamagedDataError


class Recorder:
    """A source that notes what is fetched."""

    def __init__(self, blocks: int = 40, kept: bool = True, error: Exception | None = None) -> None:
        self.blocks = Blocks.uniform(10 * blocks, 10)
        self.fetched: list[int] = []
        self.kept, self.error = kept, error
        self.store, self.block_bytes, self.distant = BlockStore("/nowhere", 1000), 100, True

    def fetch(self, block: int) -> bool:
        self.fetched.append(block)
        if self.error:
            raise self.error
        return self.kept


def _until(condition: Callable[[], Any], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


BATCHES = [np.arange(10 * b, 10 * b + 10) for b in range(40)]  # one block each


def test_it_keeps_its_distance() -> None:
    source = Recorder()
    reader = ReadAhead(source, BATCHES, Distance(5, 1), own_process=False)  # type: ignore[arg-type]
    for consumed in (0, 1, 7, 20):
        reader.consumed(consumed)
        _until(lambda consumed=consumed: len(source.fetched) == consumed + 5)
        time.sleep(0.05)
        assert sorted(source.fetched) == list(range(consumed + 5))
    reader.consumed(40)
    _until(lambda: len(source.fetched) == 40)
    _until(lambda: "read-ahead" not in [thread.name for thread in threading.enumerate()])


def test_a_block_in_use_is_not_fetched_again() -> None:
    source = Recorder(4)
    batches = [np.array([3, 12, 25]), np.array([14, 5, 21])] * 5 + [np.array([35])]
    reader = ReadAhead(source, batches, Distance(1, 3), own_process=False)  # type: ignore[arg-type]
    reader.consumed(11)
    _until(lambda: len(source.fetched) == 4)
    assert source.fetched == [0, 1, 2, 3]


def test_where_all_blocks_are_known_batches_do_not_run_away() -> None:
    source, seen = Recorder(2), []

    def batches() -> Iterator[np.ndarray]:
        for number in range(10**6):
            seen.append(number)
            yield np.array([0, 1, 15])

    reader = ReadAhead(source, batches(), Distance(2, 2), own_process=False)  # type: ignore[arg-type]
    for consumed in (0, 100):
        reader.consumed(consumed)
        _until(lambda consumed=consumed: len(seen) > consumed + 60)
        time.sleep(0.05)
        assert len(seen) <= consumed + 70
    reader.close()
    _until(lambda: "read-ahead" not in [thread.name for thread in threading.enumerate()])
    assert sorted(source.fetched) == [0, 1]


@pytest.mark.parametrize(
    ("distant", "machine", "quota", "most"),
    [
        (True, 2, "max", 8),
        (False, 2, "max", 1),
        (False, 64, "max", 4),
        (False, 512, "max", 8),
        (False, 64, "3200000", 2),  # a container with 32 of the 64 cores
        (False, 64, "200000", 1),
        (True, 64, "200000", 8),  # waiting for a network takes no core
    ],
)
def test_a_local_disk_leaves_the_cores_to_the_decoders(
    distant: bool, machine: int, quota: str, most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As many fetches at a time as hide a network's latency, or as a share of the usable cores verifies."""
    monkeypatch.setattr(os, "cpu_count", lambda: machine)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(machine)))
    (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
    monkeypatch.setattr(cpu_quota, "QUOTA", tmp_path / "cpu.max")
    source = Recorder()
    source.distant = distant
    lock, now, peak = threading.Lock(), [0], [0]

    def fetch(block: int) -> bool:
        with lock:
            now[0] += 1
            peak[0] = max(peak[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        return True

    monkeypatch.setattr(source, "fetch", fetch)
    batches = [np.arange(10 * block, 10 * block + 10) for block in range(24)]
    ahead = ReadAhead(source, batches, Distance(40, 40), own_process=False)
    ahead.consumed(24)
    deadline = time.monotonic() + 30
    while peak[0] < most and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    ahead.close()
    assert peak[0] == most


def test_closing_ends_it() -> None:
    source = Recorder()
    reader = ReadAhead(source, BATCHES, Distance(2, 1), own_process=False)  # type: ignore[arg-type]
    _until(lambda: len(source.fetched) == 2)
    reader.close()
    _until(lambda: "read-ahead" not in [thread.name for thread in threading.enumerate()])
    assert len(source.fetched) == 2


def test_it_gives_up_where_nothing_can_be_kept() -> None:
    source = Recorder(kept=False)
    ReadAhead(source, BATCHES, Distance(20, 1), own_process=False).consumed(1)  # type: ignore[arg-type]
    _until(lambda: "read-ahead" not in [thread.name for thread in threading.enumerate()])
    assert 1 <= len(source.fetched) < 40


def test_an_error_does_not_end_it() -> None:
    source = Recorder(error=DamagedDataError("bad"))
    ReadAhead(source, BATCHES, Distance(40, 1), own_process=False)  # type: ignore[arg-type]
    _until(lambda: len(source.fetched) == 40)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Distance(24, 24)),  # another window for each lane
        ({"read_ahead": 2}, Distance(6, 24)),
        ({"window": 2}, Distance(24, 6)),
        ({"window": 0}, Distance(150, 150)),  # half of the store
        ({"window": 0, "lane_batch": 2}, Distance(24, 150)),
        ({"local_workers": 8}, Distance(13, 24)),  # 37 blocks are one worker's share of the store
        ({"local_workers": 100}, Distance(1, 3)),
        ({"read_ahead": 0}, None),
    ],
)
def test_distance(changes: dict[str, int], expected: Distance | None) -> None:
    source = Recorder()
    source.store = BlockStore("/nowhere", 30_000)
    options = {"read_ahead": -1, "window": 8, "lanes": 3, "lane_batch": 64, "local_workers": 1} | changes
    assert distance(source, **options) == expected  # type: ignore[arg-type]


def test_no_store_no_reading_ahead() -> None:
    assert distance(DigitsSource("val"), -1, window=8, lanes=1, lane_batch=8, local_workers=1) is None


@pytest.fixture
def source(tmp_path: Path) -> ParquetSource:
    root = str(prepared_set(tmp_path / "set"))
    source = open_data(DataConfig(root=root, store=str(tmp_path / "blocks"))).train
    assert isinstance(source, ParquetSource)
    return source


def _batches(source: ParquetSource, workers: int, steps: int = 8) -> Any:
    order = Order(source.blocks, 2, 4, seed=1, window=2)
    data = DataConfig(pipeline="none", image_size=8, views=1, loader_workers=workers)
    return train_batches(source, data, order, 1, lanes=[0, 1], start_step=0, stop_step=steps)


def _children() -> set[str]:
    return {child.name for child in multiprocessing.active_children()}


def test_blocks_are_there_before_they_are_needed(source: ParquetSource, tmp_path: Path) -> None:
    batches = _batches(source, workers=1, steps=10**6)
    next(batches)
    assert "read-ahead" in _children()
    _until(lambda: len(list((tmp_path / "blocks").glob("*.block"))) == 7)
    batches.close()
    _until(lambda: "read-ahead" not in _children())


@pytest.mark.parametrize("workers", [0, 1])
def test_it_ends_with_the_iteration(source: ParquetSource, workers: int) -> None:
    assert len(list(_batches(source, workers))) == 16
    _until(lambda: "read-ahead" not in _children() | {thread.name for thread in threading.enumerate()})


def _train_and_hang(source: ParquetSource, pids: Any) -> None:
    torch.set_num_threads(1)  # the threads of the process that this one is forked from are not here
    batches = _batches(source, workers=1, steps=10**6)
    next(batches)
    pids.put([child.pid for child in multiprocessing.active_children()])
    signal.pause()


def _alive(pid: int) -> bool:
    try:
        # A zombie waits for its new parent only.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_it_dies_with_a_killed_parent(source: ParquetSource) -> None:
    context = multiprocessing.get_context("fork")
    pids = context.Queue()
    parent = context.Process(target=_train_and_hang, args=(source, pids), daemon=False)
    parent.start()
    children = pids.get(timeout=60)
    assert len(children) == 2  # one loader process, one that reads ahead
    parent.kill()
    parent.join()
    _until(lambda: not any(map(_alive, children)), seconds=30)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_surfaces_in_the_batch_concerned(source: ParquetSource, workers: int) -> None:
    order = Order(source.blocks, 2, 4, seed=1, window=2)
    Path(source.files[2][0]).unlink()  # the block of rows 30 and 31
    concerned = [(s, k) for s in range(8) for k in range(2) if order.positions(s, k).max() >= 30]
    before = 2 * concerned[0][0] + concerned[0][1]
    assert before > 0
    batches = _batches(source, workers)
    for _ in range(before):
        next(batches)
    with pytest.raises(DamagedDataError, match=r"train-00002-of-00003\.parquet is gone"):
        next(batches)


def test_latency_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks take 0.1 s each; with a window ahead, only the first ones are waited for."""
    root = prepared_set(tmp_path / "set", train=160, val=5)
    source = open_data(DataConfig(root=str(root), store=str(tmp_path / "blocks"))).train
    read_range = storage.read_range

    def slowly(url: str, offset: int, length: int) -> bytes:
        time.sleep(0.1)
        return read_range(url, offset, length)

    monkeypatch.setattr(storage, "read_range", slowly)
    monkeypatch.setattr(source, "distant", True)
    order = Order(source.blocks, 1, 4, seed=1, window=2)
    waits = []
    data = DataConfig(pipeline="none", image_size=8, views=1, loader_workers=1)
    batches = train_batches(source, data, order, 1, lanes=[0], start_step=0, stop_step=40)
    while True:
        begin = time.monotonic()
        if next(batches, None) is None:
            break
        waits.append(time.monotonic() - begin)
        time.sleep(0.05)  # the training step; blocks of 5 rows are needed at the rate of one in 0.06 s
    assert sum(waits[4:]) < 0.5  # 30 blocks would take 3 s
