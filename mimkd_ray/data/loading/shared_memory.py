"""Transfer of finished batches from loader processes: images go through reused shared memory.

A fresh piece of shared memory for each batch, as torch's own loader has it, would cost 0.1 ms an image at 224 pixels
(zeroed pages, two mappings, a file descriptor to send): measured, a quarter of the rate of one loader process with JPEG
images of 27 kB. Here the training process gives every batch it asks for a free slot; the loader process
stacks the images right there, and the training process uses them where they are. When all slots are taken, because
batches are being collected, or a batch does not fit, it travels as other tensors do.
"""

from __future__ import annotations

import itertools
import math
import mmap
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimkd_ray.data.loading.batches import Batches, Key, LaneBatch
from mimkd_ray.data.loading.start_method import helper_context
from mimkd_ray.errors import DamagedDataError, UserError
from mimkd_ray.storage import StorageError


class Slots:
    """`count` pieces of `size` bytes, shared with processes forked later; pages are allocated on first use."""

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self.number = next(_numbers)
        _SLOTS[self.number] = self
        self._memory = mmap.mmap(-1, count * size)
        self._free = deque(range(count))

    def take(self) -> int | None:
        """Return a free slot, the most recently used first, or None if all are in use."""
        return self._free.pop() if self._free else None

    def release(self, slot: int) -> None:
        """Return a slot that was taken and not made into a tensor."""
        self._free.append(slot)

    def memory(self, slot: int) -> Tensor:
        """Return the slot's bytes, writable by the process that holds the slot."""
        return torch.from_numpy(self._bytes(slot, self.size))

    def tensor(self, slot: int, size: int) -> Tensor:
        """Return the slot's first `size` bytes. The slot becomes free when no tensor uses its memory any more."""
        array = self._bytes(slot, size)
        weakref.finalize(array, self._free.append, slot).atexit = False
        return torch.from_numpy(array)  # the tensor and its views keep `array` alive

    def _bytes(self, slot: int, size: int) -> np.ndarray:
        return np.frombuffer(self._memory, np.uint8, size, slot * self.size)


def make_slots(count: int, size: int) -> Slots | None:
    """Return `count` slots of `size` bytes; None if loader processes could not see them."""
    return Slots(count, size) if helper_context().get_start_method() == "fork" else None


@dataclass(frozen=True)
class Requests:
    """The keys of a run, each with a slot that is free when its batch is requested."""

    keys: Iterable[Key]
    slots: Slots | None

    def __iter__(self) -> Iterator[tuple[Key, int | None]]:
        return ((key, None if self.slots is None else self.slots.take()) for key in self.keys)


@dataclass(frozen=True)
class Answers:
    """The batches of requests, as the data set of a torch DataLoader. Runs in loader processes."""

    batches: Batches
    slots: Slots | None

    def __getitem__(self, request: tuple[Key, int | None]) -> Answer:
        key, slot = request
        if self.slots is None or slot is None:
            return Answer(self._make(key, None))
        memory = self.slots.memory(slot)
        made = self._make(key, memory)
        if not isinstance(made, LaneBatch) or made.images_BCHW.data_ptr() != memory.data_ptr():
            return Answer(made, self.slots.number, slot)
        images = made.images_BCHW
        # No tensors: each would be sent through separate shared memory and take 0.1 ms to pack and unpack.
        numbers = torch.stack([made.labels_B, made.ids_B]).numpy()
        features = {label: rows.numpy() for label, rows in made.features.items()}
        bare = _Bare(made.step, made.lane, made.view, made.damaged, numbers, features)
        return Answer(bare, self.slots.number, slot, tuple(images.shape), images.is_contiguous())

    def _make(self, key: Key, memory: Tensor | None) -> LaneBatch | Failed:
        try:
            return self.batches.make(key, memory)
        except (UserError, DamagedDataError, StorageError) as error:
            return Failed(error)


@dataclass(frozen=True)
class Failed:
    """An error for people in a batch's place: a raised one would be wrapped in a traceback."""

    error: UserError | DamagedDataError | StorageError


class _Bare(NamedTuple):
    """A batch without its images; `numbers` are its labels and ids, `features` its cached rows."""

    step: int
    lane: int
    view: int
    damaged: tuple[str, ...]
    numbers: np.ndarray
    features: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Answer:
    """A batch, or what stands in its place.

    The images of a bare batch are in the slot, in `shape`, channels first or last.
    """

    made: LaneBatch | _Bare | Failed
    slots: int | None = None  # their number; None: no slot was given
    slot: int = 0
    shape: tuple[int, ...] = ()
    channels_first: bool = True

    def pin_memory(self, device: Any = None) -> Answer:
        """Return the answer with its batch in page-locked memory (a thread of the data loader calls this)."""
        made = self.open()
        return Answer(made.pin_memory() if isinstance(made, LaneBatch) else made)

    def open(self) -> LaneBatch | Failed:
        """Return what was made; once, in the training process."""
        if not isinstance(self.made, _Bare):
            if self.slots is not None:
                _SLOTS[self.slots].release(self.slot)
            return self.made
        assert self.slots is not None
        slots = _SLOTS[self.slots]
        flat = slots.tensor(self.slot, math.prod(self.shape))
        batch, channels, height, width = self.shape
        images_BCHW = (
            flat.view(self.shape)
            if self.channels_first
            else flat.view(batch, height, width, channels).permute(0, 3, 1, 2)
        )
        step, lane, view, damaged, numbers, rows = self.made
        labels_B, ids_B = torch.from_numpy(numbers)
        features = {label: torch.from_numpy(value) for label, value in rows.items()}
        return LaneBatch(step, lane, images_BCHW, labels_B, ids_B, view, damaged, features)


_SLOTS: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()  # an answer carries only their number
_numbers = itertools.count()
