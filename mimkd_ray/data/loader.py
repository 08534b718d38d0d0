"""From an order to batches: read, decode, view, stack; in this process or in loader processes.

Training batches come by (step, lane) over the whole rest of a run, so loader processes are started once and
live through epochs. What a batch holds depends on (source, order, view, step, lane) only, never on who makes
it.

A damaged image does not stop a run: it is named in `LaneBatch.damaged`, and in training its place is taken by
the nearest intact image of the batch (the id repeats, so losses do not take the copies for negatives of each
other). In evaluation it is left out. `DamageCounter` ends the run when there are too many.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mimkd_ray.data.order import Order, view_number
from mimkd_ray.data.source import Row, Source
from mimkd_ray.data.views import DamagedImageError, Transform, View, decode
from mimkd_ray.errors import DamagedDataError, UserError

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)

PREFETCH = 4  # finished batches that wait per loader process
WORKERS_PER_CPU = 4  # more loader processes than this times the cores is taken for a typing error


@dataclass(frozen=True, eq=False)
class LaneBatch:
    """The images of one lane of one step (in evaluation: of one batch; lane and view are 0)."""

    step: int
    lane: int
    images_BCHW: Tensor  # uint8
    labels_B: Tensor  # int64
    ids_B: Tensor  # int64
    view: int
    damaged: tuple[str, ...]  # names of images that could not be decoded

    def __len__(self) -> int:
        return len(self.labels_B)

    def pin_memory(self, device: Any = None) -> LaneBatch:
        """Return the batch in page-locked memory (the data loader calls this)."""
        return replace(
            self,
            images_BCHW=self.images_BCHW.pin_memory(),
            labels_B=self.labels_B.pin_memory(),
            ids_B=self.ids_B.pin_memory(),
        )


def train_batches(
    source: Source,
    order: Order,
    view: View,
    *,
    views: int,
    lanes: Sequence[int],
    start_step: int,
    stop_step: int,
    loader_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[LaneBatch]:
    """Yield the batches of steps start_step..stop_step-1 and the given lanes, by (step, lane as given).

    `views` is the number of views of a sample (0: a new one each epoch); the schedule follows `order.seed`,
    the pixels `view.seed`. Raises UserError for a senseless `loader_workers`, DamagedDataError for a batch
    without intact image.
    """
    check_loader_workers(loader_workers)
    keys = _TrainKeys(order, views, tuple(lanes), start_step, stop_step)
    return _run(_TrainBatches(source, view), keys, loader_workers, pin_memory)


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int,
    loader_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[LaneBatch]:
    """Yield this rank's contiguous slice of the set in batches; all slices together have each row once.

    The last batch is smaller; a rank may get no row at all. `step` counts the batches. Damaged images are
    left out. Raises UserError for senseless sizes, DamagedDataError if no image of a batch is intact
    (a batch of one is left out).
    """
    check_loader_workers(loader_workers)
    if batch_size < 1:
        raise UserError(f"evaluation batch size {batch_size}: give 1 or more")
    start, stop = (source.num_rows * r // world_size for r in (rank, rank + 1))
    keys = [
        _Key(step, 0, np.arange(first, min(first + batch_size, stop)), 0)
        for step, first in enumerate(range(start, stop, batch_size))
    ]
    return _run(_EvalBatches(source, transform), keys, loader_workers, pin_memory)


def check_loader_workers(loader_workers: int) -> None:
    """Raise UserError for a negative number of loader processes, or one far beyond this machine's cores."""
    cores = os.cpu_count() or 1
    if not 0 <= loader_workers <= WORKERS_PER_CPU * cores:
        raise UserError(
            f"loader_workers = {loader_workers}: this machine has {cores} cores; give 0 (decode in the "
            f"training process) to {WORKERS_PER_CPU * cores}, best about the cores per training worker "
            "(--data.loader-workers)"
        )


class DamageCounter:
    """Counts damaged images against a limit: `max_share` of the `rows` this worker reads in an epoch.

    Each damaged image is logged once. The count begins anew after `rows` rows, about an epoch: over many
    epochs one worker comes across the damaged images of all, which must not be held against its own share.
    """

    def __init__(self, max_share: float, rows: int) -> None:
        self.max_share = max_share
        self.rows = rows
        self._logged: set[str] = set()
        self._counted: dict[str, None] = {}  # in the order met
        self._seen = 0

    @property
    def damaged(self) -> int:
        """Distinct damaged images met so far."""
        return len(self._logged)

    def add(self, batch: LaneBatch) -> None:
        """Count the batch's damaged images. Raises DamagedDataError when there are too many."""
        if self._seen >= self.rows:
            self._seen = 0
            self._counted.clear()
        self._seen += len(batch)
        for name in batch.damaged:
            if name not in self._logged:
                self._logged.add(name)
                logger.warning("damaged image, left out: %s", name)
            self._counted[name] = None
        if len(self._counted) > self.max_share * self.rows:
            raise DamagedDataError(
                f"{len(self._counted):,} of {self.rows:,} images cannot be decoded, more than the allowed "
                f"share of {self.max_share:g}: {_first_three(list(self._counted))}; repair the data, or "
                "allow more with --data.max-damaged"
            )


@dataclass(frozen=True)
class _Key:
    """What to make: a whole batch is one unit of work for a loader process."""

    step: int
    lane: int
    positions: np.ndarray
    view: int


@dataclass(frozen=True)
class _TrainKeys:
    order: Order
    views: int
    lanes: tuple[int, ...]
    start_step: int
    stop_step: int

    def __len__(self) -> int:
        return max(0, self.stop_step - self.start_step) * len(self.lanes)

    def __iter__(self) -> Iterator[_Key]:
        for step in range(self.start_step, self.stop_step):
            view = view_number(self.order.seed, self.order.epoch_of(step), self.views)
            for lane in self.lanes:
                yield _Key(step, lane, self.order.positions(step, lane), view)


@dataclass(frozen=True)
class _TrainBatches:
    """Makes training batches of constant size; runs in loader processes."""

    source: Source
    view: View

    def __getitem__(self, key: _Key) -> LaneBatch | Exception:
        return _answer(self._make, key)

    def _make(self, key: _Key) -> LaneBatch:
        rows = self.source.read(key.positions.tolist())
        images, damaged = _decode_all(rows, lambda image, row: self.view.apply(image, row.id, key.view))
        intact = [place for place, image in enumerate(images) if image is not None]
        # A damaged place takes the nearest intact one; of two equally near ones the lower.
        chosen = [
            place if images[place] is not None else min(intact, key=lambda other: abs(other - place))
            for place in range(len(rows))
        ]
        return _stack(key, rows, images, chosen, damaged)


@dataclass(frozen=True)
class _EvalBatches:
    """Makes evaluation batches, without damaged images; runs in loader processes."""

    source: Source
    transform: Transform

    def __getitem__(self, key: _Key) -> LaneBatch | Exception | str:
        return _answer(self._make, key)

    def _make(self, key: _Key) -> LaneBatch | str:
        rows = self.source.read(key.positions.tolist())
        images, damaged = _decode_all(rows, lambda image, row: self.transform(image), alone_may_fail=True)
        if len(damaged) == len(rows):
            return damaged[0]
        return _stack(key, rows, images, [p for p, image in enumerate(images) if image is not None], damaged)


def _answer(make: Callable[[_Key], Answer], key: _Key) -> Answer | Exception:
    # Errors for people travel as values: a loader process would wrap a raised one in its traceback.
    try:
        return make(key)
    except (UserError, DamagedDataError) as error:
        return error


def _decode_all(
    rows: list[Row], transform: Callable[[Tensor, Row], Tensor], alone_may_fail: bool = False
) -> tuple[list[Tensor | None], tuple[str, ...]]:
    """Return the transformed images, None where damaged, and the names of the damaged ones."""
    images: list[Tensor | None] = []
    damaged = []
    for row in rows:
        try:
            images.append(transform(decode(row.image), row))
        except DamagedImageError as error:
            images.append(None)
            damaged.append(f"{row.name} ({error})")
    # An evaluation slice may end in a batch of one: that is one damaged image, and no sign of a broken set.
    if len(damaged) == len(rows) and not (alone_may_fail and len(rows) == 1):
        raise DamagedDataError(
            f"none of the {len(rows)} images of a batch can be decoded: {_first_three(damaged)}; repair the data"
        )
    return images, tuple(damaged)


def _stack(
    key: _Key, rows: list[Row], images: list[Tensor | None], chosen: list[int], damaged: tuple[str, ...]
) -> LaneBatch:
    tensors = [image for place in chosen if (image := images[place]) is not None]
    stacked = torch.empty((len(tensors), *tensors[0].shape), dtype=torch.uint8)  # C, H, W in memory order
    torch.stack(tensors, out=stacked)
    labels = torch.tensor([rows[place].label for place in chosen], dtype=torch.int64)
    ids = torch.tensor([rows[place].id for place in chosen], dtype=torch.int64)
    return LaneBatch(key.step, key.lane, stacked, labels, ids, key.view, damaged)


def _first_three(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _run(
    dataset: _TrainBatches | _EvalBatches,
    keys: _TrainKeys | list[_Key],
    loader_workers: int,
    pin_memory: bool,
) -> Iterator[LaneBatch]:
    loader: DataLoader[Any] = DataLoader(
        dataset,  # type: ignore[arg-type]  # any object with __getitem__ serves
        batch_size=None,
        sampler=keys,
        num_workers=loader_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory and torch.accelerator.is_available(),
        worker_init_fn=_start_worker,
        prefetch_factor=PREFETCH if loader_workers else None,
        generator=torch.Generator(),  # its own: the loader's draw would move the training process's generator
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        if isinstance(batch, str):
            logger.warning("damaged image, left out: %s", batch)
            continue
        yield batch


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)  # processes share the cores; threads in each would fight for them
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the training process decides
