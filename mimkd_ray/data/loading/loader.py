"""Batches of an order, made in this process or in loader processes and copied to the device.

    order  ->  keys (step, lane, positions)  ->  loader processes: read, decode, view, stack  ->  batches in the order
    of keys, a few finished ahead of need
         `->  read-ahead: blocks into the node's store, before the loader processes need them

A whole batch is one unit of work of a loader process. Processes are used and not threads, because views draw from
torch's default generator, which exists once per process. Training batches are ordered by (step, lane) over the whole
rest of a run, so loader processes are started once and live through epochs.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from mimkd_ray.config import DataConfig
from mimkd_ray.data.augment.pipelines import make_pipeline
from mimkd_ray.data.augment.views import View
from mimkd_ray.data.loading.batches import (
    Batches,
    EvalBatches,
    FeatureSource,
    Key,
    LaneBatch,
    TrainBatches,
    TrainKeys,
    ViewBatches,
)
from mimkd_ray.data.loading.cpu_quota import local_world_size, usable_cores
from mimkd_ray.data.loading.read_ahead import AheadSource, Distance, ReadAhead, WithFeatures, distance
from mimkd_ray.data.loading.shared_memory import Answer, Answers, Failed, Requests, make_slots
from mimkd_ray.data.loading.start_method import helper_context
from mimkd_ray.data.loading.stuck_loaders import LOOK_SECONDS, answers_of
from mimkd_ray.data.order.sample_order import Order
from mimkd_ray.data.sources.source import Source
from mimkd_ray.errors import UserError

PREFETCH = 4  # finished batches that wait per loader process
SPARE_SLOTS = 4  # batches that the training process has in hand
WORKERS_PER_CPU = 4  # more loader processes than this times the cores is taken for a typing error


def train_batches(
    source: Source,
    data: DataConfig,
    order: Order,
    view_seed: int,
    *,
    lanes: Sequence[int],
    start_step: int,
    stop_step: int,
    pin_memory: bool = False,
    features: FeatureSource | None = None,
) -> Iterator[LaneBatch]:
    """Yield the batches of steps start_step..stop_step-1 and the given lanes, by (step, lane as given).

    The schedule of views follows `order.seed`, the pixels `view_seed`. `features`, which need a fixed number of views,
    are read and read ahead with the images. Raises UserError for an invalid `data.loader_workers`, DamagedDataError for
    a batch without intact images or a damaged block, StorageError for an object that cannot be read.
    """
    workers = resolve_loader_workers(data.loader_workers, source)
    keys = TrainKeys(order, data.views, tuple(lanes), start_step, stop_step)
    ahead: AheadSource = source if features is None else WithFeatures(source, features, data.views)
    far = distance(
        ahead,
        data.read_ahead,
        window=order.window,
        lanes=len(keys.lanes),
        lane_batch=order.lane_batch,
        local_workers=local_world_size(),
    )
    batches = TrainBatches(source, _view(data, view_seed), features)
    return _run(batches, keys, order.lane_batch, data.image_size, workers, ahead, far, pin_memory)


def view_batches(
    source: Source, data: DataConfig, keys: Sequence[Key], view_seed: int, *, pin_memory: bool = False
) -> Iterator[LaneBatch]:
    """Yield the batches of `keys` with every row in its place, damaged ones too (`ViewBatches`), for caching."""
    workers = resolve_loader_workers(data.loader_workers, source)
    most = max((len(key.positions) for key in keys), default=1)
    far = distance(source, data.read_ahead, window=1, lanes=1, lane_batch=most, local_workers=local_world_size())
    batches = ViewBatches(source, _view(data, view_seed), data.image_size)
    return _run(batches, list(keys), most, data.image_size, workers, source, far, pin_memory)


def _view(data: DataConfig, seed: int) -> View:
    return View(make_pipeline(data.pipeline, data.image_size).train, seed)


def eval_batches(
    source: Source, data: DataConfig, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[LaneBatch]:
    """Yield this rank's contiguous slice of the set in batches; all slices together contain each row once.

    The last batch is smaller; a rank may get no rows. `step` counts the batches. Damaged images are left out. Raises
    UserError for invalid sizes, DamagedDataError if no image of a batch is intact (a batch of one is then empty).
    """
    workers = resolve_loader_workers(data.loader_workers, source)
    if batch_size < 1:
        raise UserError(f"evaluation batch size {batch_size}: give 1 or more")
    start, stop = (source.num_rows * r // world_size for r in (rank, rank + 1))
    keys = [
        Key(step, 0, np.arange(first, min(first + batch_size, stop)), 0)
        for step, first in enumerate(range(start, stop, batch_size))
    ]
    far = distance(source, data.read_ahead, window=1, lanes=1, lane_batch=batch_size, local_workers=local_world_size())
    batches = EvalBatches(source, make_pipeline(data.pipeline, data.image_size).eval)
    return _run(batches, keys, batch_size, data.image_size, workers, source, far, False)


def to_device(batches: Iterable[LaneBatch], device: torch.device) -> Iterator[LaneBatch]:
    """Yield the batches on `device`, each copied while the previous one is in use; still uint8.

    On CUDA a batch is copied from page-locked memory on a separate stream. On the CPU batches are passed through. An
    error of the loader is raised after the preceding batch was yielded.
    """
    if device.type == "cpu":
        yield from batches
        return
    copy = (
        _cuda_copy(device) if device.type == "cuda" else lambda batch: _Copy(batch.each_tensor(lambda t: t.to(device)))
    )
    iterator = iter(batches)
    ahead: _Copy | None = None
    while True:
        try:
            batch = next(iterator, None)
        except Exception:
            if ahead is not None:
                yield ahead.wait()
            raise
        started = None if batch is None else copy(batch)
        if ahead is not None:
            yield ahead.wait()
        if started is None:
            return
        ahead = started


@dataclass(frozen=True)
class _Copy:
    """A batch being copied to the device; `done` marks the end of the copy on a CUDA stream."""

    batch: LaneBatch
    done: torch.cuda.Event | None = None

    def wait(self) -> LaneBatch:
        """Make the current stream, not the caller, wait for the copy; return the batch."""
        if self.done is not None:
            stream = torch.cuda.current_stream(self.batch.images_BCHW.device)
            stream.wait_event(self.done)
            # The memory belongs to the side stream, which must not reuse it before the current stream has finished with
            # it.
            for tensor in self.batch.tensors():
                tensor.record_stream(stream)
        return self.batch


def _cuda_copy(device: torch.device) -> Callable[[LaneBatch], _Copy]:
    stream = torch.cuda.Stream(device)

    def copy(batch: LaneBatch) -> _Copy:
        pinned = batch.each_tensor(lambda tensor: tensor if tensor.is_pinned() else tensor.pin_memory())
        with torch.cuda.stream(stream):
            moved = pinned.each_tensor(lambda tensor: tensor.to(device, non_blocking=True))
            return _Copy(moved, stream.record_event())

    return copy


def resolve_loader_workers(loader_workers: int, source: Source) -> int:
    """Return the number of loader processes: none for a set in memory, else by default one per core of this worker's
    share of the machine, minus one core for the training process and read-ahead.

    Raises UserError for an invalid number.
    """
    if loader_workers == -1:
        return 0 if source.in_memory else max(1, usable_cores() // local_world_size() - 1)
    check_loader_workers(loader_workers)
    return loader_workers


def check_loader_workers(loader_workers: int) -> None:
    """Raise UserError for a negative number of loader processes, or one far above this machine's cores."""
    cores = os.cpu_count() or 1
    if not 0 <= loader_workers <= WORKERS_PER_CPU * cores:
        raise UserError(
            f"loader_workers = {loader_workers}: this machine has {cores} cores; give 0 (decode in the "
            f"training process) to {WORKERS_PER_CPU * cores}, best about the cores per training worker, or -1 "
            "(automatic) (--data.loader-workers)"
        )


@dataclass(frozen=True)
class _PositionsOf:
    keys: TrainKeys | list[Key]
    ahead: AheadSource

    def __iter__(self) -> Iterator[np.ndarray]:
        if isinstance(self.ahead, WithFeatures):
            return (self.ahead.places(key.positions, key.view) for key in self.keys)
        return (key.positions for key in self.keys)


def _run(
    batches: Batches,
    keys: TrainKeys | list[Key],
    batch_size: int,
    image_size: int,
    loader_workers: int,
    ahead: AheadSource,
    far: Distance | None,
    pin_memory: bool,
) -> Iterator[LaneBatch]:
    if not len(keys):
        return
    count = PREFETCH * loader_workers + SPARE_SLOTS
    slots = make_slots(count, batch_size * 3 * image_size**2) if loader_workers else None
    loader: DataLoader[Any] = DataLoader(
        Answers(batches, slots),  # type: ignore[arg-type]  # any object with __getitem__ serves
        batch_size=None,
        sampler=Requests(keys, slots),
        num_workers=loader_workers,
        multiprocessing_context=helper_context() if loader_workers else None,
        collate_fn=_unchanged,
        pin_memory=pin_memory and torch.accelerator.is_available(),
        worker_init_fn=_start_worker,
        prefetch_factor=PREFETCH if loader_workers else None,
        timeout=LOOK_SECONDS if loader_workers else 0,
        generator=torch.Generator(),  # the loader's draw would change the training process's generator
    )
    reader = ReadAhead(ahead, _PositionsOf(keys, ahead), far, loader_workers > 0) if far else None
    try:
        # Closed at once, also after an error, whose traceback would keep it: torch waits 5 s for each process of one
        # that is left to the garbage collector.
        with closing(answers_of(loader, keys, batches)) as answers:
            yield from _opened(answers, reader)
    finally:
        if reader is not None:
            reader.close()


def _opened(answers: Iterator[Answer], reader: ReadAhead | None) -> Iterator[LaneBatch]:
    for number, answer in enumerate(answers, start=1):
        if reader is not None:
            reader.consumed(number)
        made = answer.open()
        if isinstance(made, Failed):
            raise made.error
        yield made


def _unchanged(answer: Any) -> Any:
    return answer


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)  # processes share the cores; threads in each would compete for them
    gc.freeze()  # objects from before the fork are never garbage here and need not be scanned
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the training process decides
