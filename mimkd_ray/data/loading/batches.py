"""One batch: its rows are read, decoded, augmented and stacked. Runs in loader processes.

The content of a batch depends only on (source, order, view, step, lane), not on the process that makes it.

A damaged image does not stop a run: it is named in `LaneBatch.damaged`, and in training its place is taken by
the nearest intact image of the batch (the id repeats, so losses do not take the copies for negatives of each
other). In evaluation it is left out. `DamageCounter` (damaged_images.py) ends the run when there are too many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mimkd_ray.data.augment.decode import DamagedImageError, decode
from mimkd_ray.data.augment.transforms import Transform
from mimkd_ray.data.augment.views import View
from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.data.order.sample_order import Order, view_number
from mimkd_ray.data.sources.columns import NO_LABEL
from mimkd_ray.data.sources.source import Row, Source
from mimkd_ray.data.store.block_store import BlockStore
from mimkd_ray.errors import DamagedDataError


@dataclass(frozen=True, eq=False)
class LaneBatch:
    """The images of one lane of one step (in evaluation: of one batch; lane and view are 0)."""

    step: int
    lane: int
    images_BCHW: Tensor  # uint8; channels last in memory if the pipeline returns images so
    labels_B: Tensor  # int64
    ids_B: Tensor  # int64
    view: int
    damaged: tuple[str, ...]  # names of images that could not be decoded
    features: Mapping[str, Tensor] = field(default_factory=dict)  # cached rows (B, bytes), uint8, by label

    def __len__(self) -> int:
        return len(self.labels_B)

    def pin_memory(self, device: Any = None) -> LaneBatch:
        """Return the batch in page-locked memory (the data loader calls this)."""
        return self.each_tensor(lambda tensor: tensor.pin_memory())

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in a fixed order."""
        return [self.images_BCHW, self.labels_B, self.ids_B, *self.features.values()]

    def each_tensor(self, change: Callable[[Tensor], Tensor]) -> LaneBatch:
        """Return the batch with each tensor replaced by `change(tensor)`."""
        return replace(
            self,
            images_BCHW=change(self.images_BCHW),
            labels_B=change(self.labels_B),
            ids_B=change(self.ids_B),
            features={label: change(rows) for label, rows in self.features.items()},
        )


@dataclass(frozen=True)
class Key:
    """The positions, lane and view of one batch, the unit of work of a loader process."""

    step: int
    lane: int
    positions: np.ndarray
    view: int


@dataclass(frozen=True)
class TrainKeys:
    """The keys of steps start_step..stop_step-1 and these lanes, ordered by (step, lane as given)."""

    order: Order
    views: int
    lanes: tuple[int, ...]
    start_step: int
    stop_step: int

    def __len__(self) -> int:
        return max(0, self.stop_step - self.start_step) * len(self.lanes)

    def __iter__(self) -> Iterator[Key]:
        for step in range(self.start_step, self.stop_step):
            view = view_number(self.order.seed, self.order.epoch_of(step), self.views)
            for lane in self.lanes:
                yield Key(step, lane, self.order.positions(step, lane), view)


DAMAGED = -2
"""Label of a damaged image that keeps its place in a batch. Images without a label have NO_LABEL, whatever negative
number the data has for it."""


class FeatureSource(Protocol):
    """Cached features of the training set, by position."""

    def read(self, view: int, positions: np.ndarray, ids: np.ndarray) -> Mapping[str, np.ndarray]:
        """Return {label: rows (B, bytes), uint8}. Raises DamagedDataError if the ids are not those of the positions."""
        ...

    @property
    def store(self) -> BlockStore | None:
        """Store of the features that were read."""
        ...

    @property
    def distant(self) -> bool:
        """True if fetching features waits for a network."""
        ...

    def block_bytes(self, blocks: Blocks) -> int:
        """Return the mean bytes of features in the store that belong to one of the training set's blocks."""
        ...

    def fetch(self, view: int, first: int, stop: int) -> bool:
        """Fetch the features of positions first..stop-1 into the store; return whether they are there."""
        ...


@dataclass(frozen=True)
class _Views:
    """A maker of batches of views."""

    source: Source
    view: View

    def _decoded(self, key: Key, memory: Tensor | None, instead: Tensor | None = None) -> _Decoded:
        def transform(row: Row, out: Tensor | None) -> Tensor:
            return self.view.replay(row.image, row.id, key.view, out, row.how)

        with torch.random.fork_rng(devices=()):  # once a batch: its 4 us would matter per image
            return _decode_all(self.source, key, transform, memory, instead)


@dataclass(frozen=True)
class TrainBatches(_Views):
    """A maker of training batches of constant size; runs in loader processes."""

    features: FeatureSource | None = None

    def make(self, key: Key, memory: Tensor | None = None) -> LaneBatch:
        """Return the batch, with its images in `memory` (bytes) if they fit."""
        made = self._decoded(key, memory)
        if not made.places:
            raise none_intact(made.damaged)
        if made.damaged:
            made = made.chosen(nearest_intact(made.places, len(key.positions)))
        batch = made.batch(key)
        if self.features is None:
            return batch
        found = self.features.read(key.view, key.positions[made.places], batch.ids_B.numpy())
        return replace(batch, features={label: torch.from_numpy(rows) for label, rows in found.items()})


@dataclass(frozen=True)
class ViewBatches(_Views):
    """A maker of batches of one view that keep every row, for caching; runs in loader processes.

    A damaged image is black, `image_size` squared, and its label is DAMAGED.
    """

    image_size: int

    def make(self, key: Key, memory: Tensor | None = None) -> LaneBatch:
        """Return the batch, with its images in `memory` (bytes) if they fit."""
        black = torch.zeros((self.image_size, self.image_size, 3), dtype=torch.uint8).permute(2, 0, 1)
        return self._decoded(key, memory, black).batch(key)


@dataclass(frozen=True)
class EvalBatches:
    """A maker of evaluation batches without damaged images; runs in loader processes."""

    source: Source
    transform: Transform

    def make(self, key: Key, memory: Tensor | None = None) -> LaneBatch:
        """Return the batch, its images in `memory` (bytes), if they fit; it is empty if its only image is damaged."""
        made = _decode_all(self.source, key, self._view, memory)
        if not made.places and len(key.positions) > 1:
            raise none_intact(made.damaged)
        return made.batch(key)

    def _view(self, row: Row, out: Tensor | None) -> Tensor:
        return self.transform(decode(row.image, how=row.how))


Batches = TrainBatches | ViewBatches | EvalBatches
"""A maker of batches, run in a loader process."""


def nearest_intact(places: Sequence[int], count: int) -> list[int]:
    """Return for each of `count` places the index of the nearest intact place; the lower of two equally near ones."""
    return [min(range(len(places)), key=lambda i: abs(places[i] - place)) for place in range(count)]


def first_three(names: Sequence[str]) -> str:
    """Return the names, of many the first three."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


_NONE = torch.empty((0, 3, 0, 0), dtype=torch.uint8)


def none_intact(names: Sequence[str]) -> DamagedDataError:
    """Return the error of a batch without an intact image."""
    return DamagedDataError(
        f"none of the {len(names)} images of a batch can be decoded: {first_three(names)}; repair the data"
    )


@dataclass(frozen=True)
class _Decoded:
    """The intact images of a batch, their places in it, labels and ids, and the names of the damaged ones."""

    images_BCHW: Tensor
    places: list[int]
    labels: list[int]
    ids: list[int]
    damaged: tuple[str, ...]

    def chosen(self, which: list[int]) -> _Decoded:
        """Return the given images in the given order."""
        places, labels, ids = ([of_all[i] for i in which] for of_all in (self.places, self.labels, self.ids))
        return _Decoded(self.images_BCHW[which], places, labels, ids, self.damaged)

    def batch(self, key: Key) -> LaneBatch:
        labels, ids = torch.tensor([self.labels, self.ids], dtype=torch.int64)
        return LaneBatch(key.step, key.lane, self.images_BCHW, labels, ids, key.view, self.damaged)


def _decode_all(
    source: Source,
    key: Key,
    transform: Callable[[Row, Tensor | None], Tensor],
    memory: Tensor | None,
    instead: Tensor | None = None,
) -> _Decoded:
    """Return the transformed intact images of the key's rows, in `memory` if they fit.

    `transform` takes a row and its image's place in the batch, where it may write the result; None for the first one.
    `instead` takes the place of a damaged image, with the label DAMAGED.

    Each image is copied to its place at once, in its own layout, mostly channels last: keeping all results would cost
    50 us an image for fresh memory, and another layout 60 us.
    """
    images_BCHW: Tensor | None = None
    rooms: Iterator[Tensor] = iter(())  # one for each image; made in one call, which saves 1 us an image
    out: Tensor | None = None
    made = _Decoded(_NONE, [], [], [], ())
    damaged = []
    for place, row in enumerate(source.read(key.positions.tolist())):
        label = max(row.label, NO_LABEL)
        try:
            try:
                image = transform(row, out)
            except DamagedImageError:
                # What was verified once may have been damaged since, in the store or in the file.
                again = source.read_again(int(key.positions[place]))
                if again is None or bytes(again.image) == bytes(row.image):
                    raise
                image = transform(again, out)
        except DamagedImageError as error:
            damaged.append(f"{row.name} ({error})")
            if instead is None:
                continue
            image, label = instead, DAMAGED
        if images_BCHW is None:
            images_BCHW = _room_for(len(key.positions), image, memory)
            rooms = iter(images_BCHW.unbind())
            out = next(rooms)
        assert out is not None
        if image is not out:
            out.copy_(image)
        out = next(rooms, None)
        made.places.append(place)
        made.labels.append(label)
        made.ids.append(row.id)
    images_BCHW = _NONE if images_BCHW is None else images_BCHW[: len(made.places)]
    return replace(made, images_BCHW=images_BCHW, damaged=tuple(damaged))


def _room_for(count: int, image: Tensor, memory: Tensor | None) -> Tensor:
    """Return a tensor for `count` images with the memory layout of this one."""
    size = count * image.numel()
    if memory is None or size > len(memory):
        memory = torch.empty(size, dtype=torch.uint8)
    channels, height, width = image.shape
    if image.is_contiguous():
        return memory[:size].view(count, channels, height, width)
    return memory[:size].view(count, height, width, channels).permute(0, 3, 1, 2)
