"""One batch: its rows are read, decoded, viewed and stacked. Runs in loader processes.

What a batch holds depends on (source, order, view, step, lane) only, never on who makes it.

A damaged image does not stop a run: it is named in `LaneBatch.damaged`, and in training its place is taken by
the nearest intact image of the batch (the id repeats, so losses do not take the copies for negatives of each
other). In evaluation it is left out. `DamageCounter` ends the run when there are too many.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mimkd_ray.data.source import Row, Source
from mimkd_ray.data.views import DamagedImageError, Transform, View, decode
from mimkd_ray.errors import DamagedDataError, UserError
from mimkd_ray.storage import StorageError

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


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
        return self.each_tensor(lambda tensor: tensor.pin_memory())

    def each_tensor(self, change: Callable[[Tensor], Tensor]) -> LaneBatch:
        """Return the batch with `change(tensor)` in the place of each tensor."""
        return replace(
            self, images_BCHW=change(self.images_BCHW), labels_B=change(self.labels_B), ids_B=change(self.ids_B)
        )


@dataclass(frozen=True)
class Key:
    """What to make: a whole batch is one unit of work for a loader process."""

    step: int
    lane: int
    positions: np.ndarray
    view: int


@dataclass(frozen=True)
class TrainBatches:
    """Makes training batches of constant size; runs in loader processes."""

    source: Source
    view: View

    def __getitem__(self, key: Key) -> LaneBatch | Exception:
        return _answer(self._make, key)

    def _make(self, key: Key) -> LaneBatch:
        rows = self.source.read(key.positions.tolist())
        images, damaged = _decode_all(rows, lambda row: self.view.apply(row.image, row.id, key.view))
        intact = [place for place, image in enumerate(images) if image is not None]
        # A damaged place takes the nearest intact one; of two equally near ones the lower.
        chosen = [
            place if images[place] is not None else min(intact, key=lambda other: abs(other - place))
            for place in range(len(rows))
        ]
        return _stack(key, rows, images, chosen, damaged)


@dataclass(frozen=True)
class EvalBatches:
    """Makes evaluation batches, without damaged images; runs in loader processes."""

    source: Source
    transform: Transform

    def __getitem__(self, key: Key) -> LaneBatch | Exception | str:
        return _answer(self._make, key)

    def _make(self, key: Key) -> LaneBatch | str:
        rows = self.source.read(key.positions.tolist())
        images, damaged = _decode_all(rows, lambda row: self.transform(decode(row.image)), alone_may_fail=True)
        if len(damaged) == len(rows):
            return damaged[0]
        return _stack(key, rows, images, [p for p, image in enumerate(images) if image is not None], damaged)


def _answer(make: Callable[[Key], Answer], key: Key) -> Answer | Exception:
    # Errors for people travel as values: a loader process would wrap a raised one in its traceback.
    try:
        return make(key)
    except (UserError, DamagedDataError, StorageError) as error:
        return error


def _decode_all(
    rows: list[Row], transform: Callable[[Row], Tensor], alone_may_fail: bool = False
) -> tuple[list[Tensor | None], tuple[str, ...]]:
    """Return the transformed images, None where damaged, and the names of the damaged ones."""
    images: list[Tensor | None] = []
    damaged = []
    for row in rows:
        try:
            images.append(transform(row))
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
    key: Key, rows: list[Row], images: list[Tensor | None], chosen: list[int], damaged: tuple[str, ...]
) -> LaneBatch:
    tensors = [image for place in chosen if (image := images[place]) is not None]
    stacked = torch.empty((len(tensors), *tensors[0].shape), dtype=torch.uint8)  # C, H, W in memory order
    torch.stack(tensors, out=stacked)
    labels = torch.tensor([rows[place].label for place in chosen], dtype=torch.int64)
    ids = torch.tensor([rows[place].id for place in chosen], dtype=torch.int64)
    return LaneBatch(key.step, key.lane, stacked, labels, ids, key.view, damaged)


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


def _first_three(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
