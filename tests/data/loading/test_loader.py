from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import encode, images, parquet_set, pixels, write_parquet

from mimkd_ray import storage
from mimkd_ray.cli.command_line import guarded
from mimkd_ray.config import DataConfig
from mimkd_ray.data.augment.decode import decode
from mimkd_ray.data.augment.pipelines import make_pipeline
from mimkd_ray.data.augment.views import View
from mimkd_ray.data.loading import loader, shared_memory, stuck_loaders
from mimkd_ray.data.loading.batches import LaneBatch
from mimkd_ray.data.loading.damaged_images import DamageCounter, damaged_allowed
from mimkd_ray.data.loading.loader import (
    PREFETCH,
    SPARE_SLOTS,
    eval_batches,
    resolve_loader_workers,
    to_device,
    train_batches,
)
from mimkd_ray.data.order.sample_order import Order, view_number
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.data.sources.digits import DigitsSource
from mimkd_ray.data.sources.parquet import ParquetSource
from mimkd_ray.data.sources.source import Source
from mimkd_ray.errors import DamagedDataError, UserError

CIFAR = make_pipeline("cifar", 12)
DATA = DataConfig(pipeline="cifar", image_size=12, views=2, loader_workers=0)


def _train(source: Source, lanes: list[int], workers: int = 0, start: int = 0, stop: int = 8) -> list[LaneBatch]:
    order = Order(source.blocks, 3, 4, seed=1, window=3)
    data = replace(DATA, loader_workers=workers)
    return list(train_batches(source, data, order, 5, lanes=lanes, start_step=start, stop_step=stop))


def _assert_same(a: list[LaneBatch], b: list[LaneBatch]) -> None:
    assert [(x.step, x.lane, x.view, x.damaged) for x in a] == [(x.step, x.lane, x.view, x.damaged) for x in b]
    for x, y in zip(a, b, strict=True):
        for name in ("images_BCHW", "labels_B", "ids_B"):
            assert torch.equal(getattr(x, name), getattr(y, name)), name


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return open_data(DataConfig(root=str(parquet_set(tmp_path)))).train


def test_batches_are_what_order_and_view_say(source: Source) -> None:
    order = Order(source.blocks, 3, 4, seed=1, window=3)
    batches = _train(source, [0, 1, 2])
    assert [(b.step, b.lane) for b in batches] == [(s, lane) for s in range(8) for lane in range(3)]
    for batch in batches:
        positions = order.positions(batch.step, batch.lane)
        assert batch.ids_B.tolist() == positions.tolist()
        assert batch.labels_B.tolist() == (positions % 3).tolist()
        assert batch.view == view_number(1, order.epoch_of(batch.step), 2)
        assert batch.images_BCHW.dtype == torch.uint8
        assert batch.images_BCHW.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels_B.dtype == batch.ids_B.dtype == torch.int64
        assert len(batch) == 4
        row = source.read([int(positions[2])])[0]
        expected = View(CIFAR.train, 5).apply(decode(row.image), row.id, batch.view)
        assert torch.equal(batch.images_BCHW[2], expected)


def test_loader_processes_change_nothing(source: Source) -> None:
    torch.manual_seed(3)
    inline = _train(source, [0, 1, 2])
    workers = _train(source, [0, 1, 2], workers=2)
    after = torch.rand(3)
    _assert_same(inline, workers)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), after)  # the model's random numbers are not touched


def test_lanes_may_be_dealt_to_any_worker(source: Source) -> None:
    whole = _train(source, [0, 1, 2])
    dealt = _train(source, [0, 2]) + _train(source, [1])
    _assert_same(whole, sorted(dealt, key=lambda b: (b.step, b.lane)))


def test_a_run_can_start_anywhere(source: Source) -> None:
    _assert_same(_train(source, [0, 1, 2])[15:], _train(source, [0, 1, 2], start=5))
    assert _train(source, [0], start=8, stop=8) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_may_be_left_early(source: Source, workers: int) -> None:
    order = Order(source.blocks, 3, 4, seed=1)
    data = replace(DATA, views=0, loader_workers=workers)
    batches = train_batches(source, data, order, 5, lanes=[0], start_step=0, stop_step=10**6)
    assert next(batches).step == 0
    del batches


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 3, 9, 32])
def test_evaluation_counts_each_row_once(world_size: int, rows: int) -> None:
    from mimkd_ray.data.sources.source import SubsetSource

    source = SubsetSource(DigitsSource("val"), range(10, 10 + rows))
    data = DataConfig(pipeline="none", image_size=8)
    ids: list[int] = []
    for rank in range(world_size):
        batches = list(eval_batches(source, data, 4, rank, world_size))
        assert all(len(b) == 4 for b in batches[:-1])
        assert [b.step for b in batches] == list(range(len(batches)))
        for batch in batches:
            ids += batch.ids_B.tolist()
            np.testing.assert_array_equal(batch.labels_B, DigitsSource("val").labels()[batch.ids_B])
    assert ids == list(range(10, 10 + rows))


def test_evaluation_in_loader_processes() -> None:
    source, data = DigitsSource("val"), DataConfig(pipeline="none", image_size=8)
    inline, workers = (list(eval_batches(source, replace(data, loader_workers=n), 64)) for n in (0, 2))
    _assert_same(inline, workers)
    assert len(inline[-1]) == 450 % 64
    row = source.read([70])[0]
    assert torch.equal(inline[1].images_BCHW[6], decode(row.image))


def test_a_loader_process_that_is_killed_ends_a_job_with_a_line(
    source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(multiprocessing.active_children())

    def work() -> int:
        for batch in eval_batches(source, replace(DATA, loader_workers=1), 1):
            for process in set(multiprocessing.active_children()) - before:
                process.kill()
                time.sleep(0.2)
            went_on.append(len(batch))
        return 0

    went_on: list[int] = []
    assert guarded("job", work, "") == 1
    assert went_on, "the death is told where the next batch is asked for, not anywhere in the training process"
    assert re.fullmatch(
        r"job: DataLoader worker \(pid.*\) .*: a process that reads images ended, .*memory.*goes on.*\n",
        capsys.readouterr().err,
    )


def test_a_run_that_is_asked_to_stop_does_without_a_stopped_loader_process(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()
    monkeypatch.setattr(loader, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(stuck_loaders, "STUCK_SECONDS", 0.3)
    monkeypatch.setattr(stuck_loaders, "ASKED_TO_STOP", asked)
    before = set(multiprocessing.active_children())
    batches = eval_batches(source, replace(DATA, loader_workers=2), 1)
    found = [next(batches)]
    stopped = [p for p in set(multiprocessing.active_children()) - before if p.name != "read-ahead"]
    assert len(stopped) == 2
    for process in stopped:
        os.kill(process.pid, signal.SIGSTOP)
    threading.Timer(0.3, asked.set).start()
    began = time.monotonic()
    found += batches
    assert 0.5 < time.monotonic() - began < 5
    assert not set(multiprocessing.active_children()) - before
    _assert_same(found, list(eval_batches(source, DATA, 1)))


def test_a_request_to_stop_that_ends_the_loader_processes_too(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm and torchrun send SIGTERM to every process of a job."""
    asked = threading.Event()
    monkeypatch.setattr(stuck_loaders, "ASKED_TO_STOP", asked)
    before = set(multiprocessing.active_children())
    batches = eval_batches(source, replace(DATA, loader_workers=2), 1)
    found = [next(batches)]
    for process in set(multiprocessing.active_children()) - before:
        if process.name != "read-ahead":
            os.kill(process.pid, signal.SIGTERM)
    asked.set()
    found += batches
    assert not set(multiprocessing.active_children()) - before
    _assert_same(found, list(eval_batches(source, DATA, 1)))


def _damaged_set(tmp_path: Path, broken: set[int], rows: int = 12) -> ParquetSource:
    files = images(rows)
    good = encode(pixels(0, 64, 64), "JPEG")
    for i in broken:
        files[i] = (None, b"junk", good[: len(good) // 2])[i % 3]
    write_parquet(tmp_path / "train-0.parquet", files, [i % 3 for i in range(rows)])
    return ParquetSource(storage.list_sizes(str(tmp_path)))


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_training_images_are_replaced_by_the_nearest(tmp_path: Path, workers: int) -> None:
    source = _damaged_set(tmp_path, {1, 5, 6, 10})
    for batch in _train(source, [0, 1, 2], workers, stop=4):
        positions = Order(source.blocks, 3, 4, seed=1, window=3).positions(batch.step, batch.lane).tolist()
        intact = [p not in {1, 5, 6, 10} for p in positions]
        assert len(batch.damaged) == intact.count(False)
        for place, position in enumerate(positions):
            around = (p for d in range(4) for p in (place - d, place + d) if 0 <= p < 4)
            nearest = next(p for p in around if intact[p])
            assert batch.ids_B[place] == positions[nearest]
            assert batch.labels_B[place] == positions[nearest] % 3
            assert torch.equal(batch.images_BCHW[place], batch.images_BCHW[nearest])
            if not intact[place]:
                assert any(name.startswith(f"train-0.parquet row {position} (") for name in batch.damaged)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_evaluation_images_are_left_out(tmp_path: Path, workers: int) -> None:
    source = _damaged_set(tmp_path, {1, 5, 12}, rows=13)
    batches = list(eval_batches(source, replace(DATA, loader_workers=workers), 4))
    assert [b.ids_B.tolist() for b in batches] == [[0, 2, 3], [4, 6, 7], [8, 9, 10, 11], []]
    assert [len(b.damaged) for b in batches] == [1, 1, 0, 1]
    assert "row 12" in batches[3].damaged[0], "a batch of one without its image"


@pytest.mark.parametrize("workers", [0, 1])
def test_no_intact_image_at_all(tmp_path: Path, workers: int) -> None:
    source, before = _damaged_set(tmp_path, set(range(12))), set(multiprocessing.active_children())
    with pytest.raises(DamagedDataError) as caught:
        _train(source, [0], workers)
    assert not set(multiprocessing.active_children()) - before, "they end with the error, not with the last trace of it"
    message = str(caught.value)
    assert message.startswith("none of the 4 images of a batch can be decoded: train-0.parquet row")
    assert message.count("row ") == 3
    assert "Traceback" not in message
    with pytest.raises(DamagedDataError, match="none of the 6"):
        list(eval_batches(source, replace(DATA, loader_workers=workers), 6))


def _batch(size: int, *damaged: str) -> LaneBatch:
    numbers = torch.zeros(size, dtype=torch.int64)
    return LaneBatch(0, 0, torch.zeros((size, 3, 1, 1), dtype=torch.uint8), numbers, numbers, 0, damaged)


def test_damage_counter(caplog: pytest.LogCaptureFixture) -> None:
    counter = DamageCounter(0.002, rows=1500)
    with caplog.at_level(logging.WARNING):
        counter.add(_batch(10, "a", "b"))
        counter.add(_batch(10, "a"))
    assert counter.damaged == 2
    assert [record.getMessage() for record in caplog.records] == [
        "damaged image, left out: a",
        "damaged image, left out: b",
    ]
    with pytest.raises(DamagedDataError) as caught:
        counter.add(_batch(10, "c", "d", "e", "f"))
    for part in ("6 of 1,500 images", "0.002", "a, b, c, ...", "--data.max-damaged"):
        assert part in str(caught.value)


def test_damage_is_counted_by_epoch() -> None:
    counter = DamageCounter(0.02, rows=100)
    for epoch in range(4):
        counter.add(_batch(50, *(f"{epoch} {name}" for name in "abc")))
        counter.add(_batch(50, f"{epoch} d"))
    assert counter.damaged == 16


def test_a_handful_of_a_small_set_may_be_damaged() -> None:
    counter = DamageCounter(0.001, rows=200)
    counter.add(_batch(100, *"abcde"))
    with pytest.raises(DamagedDataError, match="6 of 200 images"):
        counter.add(_batch(10, "f"))
    assert [damaged_allowed(0.001, rows) for rows in (1, 3, 8, 200, 5000, 10_000)] == [0.001, 1, 4, 5, 5, 10]


def test_no_damage_allowed() -> None:
    with pytest.raises(DamagedDataError, match="1 of 1,000"):
        DamageCounter(0.0, rows=1000).add(_batch(10, "a"))
    DamageCounter(1.0, rows=2).add(_batch(2, "a", "b"))


def test_senseless_loader_workers(source: Source) -> None:
    workers = 4 * (os.cpu_count() or 1) + 1
    with pytest.raises(UserError, match=f"loader_workers = {workers}.*cores"):
        _train(source, [0], workers)
    with pytest.raises(UserError, match="loader_workers"):
        eval_batches(source, replace(DATA, loader_workers=workers), 4)


def test_pinning_reaches_every_tensor(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned: list[torch.dtype] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.dtype) or self)
    batch = _train(source, [0], stop=1)[0]
    _assert_same([pin_memory(batch)], [batch])
    assert pinned == [torch.uint8, torch.int64, torch.int64]


def test_senseless_batch_size(source: Source) -> None:
    with pytest.raises(UserError, match="batch size 0"):
        eval_batches(source, DATA, 0)


def count_slots(monkeypatch: pytest.MonkeyPatch) -> list[shared_memory.Slots]:
    made: list[shared_memory.Slots] = []
    make = shared_memory.Slots

    def remember(*arguments: int) -> shared_memory.Slots:
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(shared_memory, "Slots", remember)
    return made


def test_slots_are_used_again_when_batches_are_gone(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_slots(monkeypatch)
    inline = _train(source, [0, 1, 2])
    order = Order(source.blocks, 3, 4, seed=1, window=3)
    data = replace(DATA, loader_workers=1)
    batches = train_batches(source, data, order, 5, lanes=[0, 1, 2], start_step=0, stop_step=8)
    places = set()
    for expected in inline:
        batch = next(batches)
        places.add(batch.images_BCHW.data_ptr())
        _assert_same([batch], [expected])
        del batch
    assert next(batches, None) is None
    (slots,) = made
    free = [slots.take() for _ in range(20)]
    assert sorted(slot for slot in free if slot is not None) == list(range(PREFETCH + SPARE_SLOTS))
    assert len(places) <= PREFETCH + SPARE_SLOTS


def test_collected_batches_keep_their_images(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_slots(monkeypatch)
    collected = _train(source, [0, 1, 2], workers=1)
    assert len(collected) == 24 > 8  # more than there are slots
    _assert_same(collected, _train(source, [0, 1, 2]))
    assert made[0].take() is None
    views = [batch.images_BCHW[1:] for batch in collected]
    copies = [view.clone() for view in views]
    del collected
    gc.collect()
    _assert_same(_train(source, [0, 1, 2], workers=1), _train(source, [0, 1, 2]))
    assert all(torch.equal(view, copy) for view, copy in zip(views, copies, strict=True))


def test_batches_that_do_not_fit_travel_otherwise(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "make_slots", lambda count, size: shared_memory.make_slots(count, 12))
    made = count_slots(monkeypatch)
    _assert_same(_train(source, [0, 1], workers=2), _train(source, [0, 1]))
    assert made[0].take() is not None  # none is lost


def test_automatic_loader_workers(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "usable_cores", lambda: 9)
    assert resolve_loader_workers(-1, DigitsSource("val")) == 0
    for local, expected in (("1", 8), ("2", 3), ("20", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert resolve_loader_workers(-1, source) == expected
    assert resolve_loader_workers(1, source) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "none")
    with pytest.raises(UserError, match="LOCAL_WORLD_SIZE is 'none'"):
        resolve_loader_workers(-1, source)


def test_batches_are_moved_one_ahead(source: Source) -> None:
    asked = []

    def batches() -> Iterator[LaneBatch]:
        for batch in _train(source, [0, 1], stop=2):
            asked.append((batch.step, batch.lane))
            yield batch
        raise DamagedDataError("the fifth")

    moved = to_device(batches(), torch.device("meta"))
    for count in range(1, 5):
        batch = next(moved)
        assert (batch.step, batch.lane) == asked[count - 1]
        assert {t.device.type for t in (batch.images_BCHW, batch.labels_B, batch.ids_B)} == {"meta"}
        assert len(asked) == min(4, count + 1)
    with pytest.raises(DamagedDataError, match="the fifth"):
        next(moved)


def test_on_the_cpu_batches_are_handed_through(source: Source) -> None:
    batches = _train(source, [0], stop=3)
    assert [a is b for a, b in zip(to_device(batches, torch.device("cpu")), batches, strict=True)] == [True] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_on_cuda(source: Source, workers: int) -> None:
    batches = _train(source, [0, 1], workers)
    for moved, expected in zip(to_device(iter(batches), torch.device("cuda")), batches, strict=True):
        assert moved.images_BCHW.is_cuda
        assert torch.equal(moved.images_BCHW.cpu(), expected.images_BCHW)
        assert torch.equal(moved.ids_B.cpu(), expected.ids_B)
