"""A small data set kept on the device: decoded once, without loader processes; a batch is a gather of rows.

This is for sets such as CIFAR (50,000 images of 32 x 32: 154 MB), whose steps on a GPU are shorter than decoding and
transferring their batches. The per-image part of the pipeline must draw no random numbers, because it runs only once
(in `cifar`, `digits` and `none` it is the resize to the image size); crop and flip are computed per batch, as always.
Batches equal those of the ordinary loader bit for bit, damaged images included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from mimkd_ray.config import DataConfig
from mimkd_ray.data.augment.pipelines import make_pipeline
from mimkd_ray.data.augment.transforms import Transform, can_be_resident
from mimkd_ray.data.loading.batches import (
    DAMAGED,
    FeatureSource,
    Key,
    LaneBatch,
    TrainKeys,
    nearest_intact,
    none_intact,
)
from mimkd_ray.data.loading.loader import view_batches
from mimkd_ray.data.order.sample_order import Order
from mimkd_ray.data.sources.source import Source

CHUNK = 512  # images decoded as one batch during loading
MEMORY_SHARE = 8  # the set may take 1/8 of a GPU's memory without being requested


def keeps_on_device(config: DataConfig, transform: Transform, rows: int, device: torch.device) -> bool:
    """Return whether a training set of `rows` rows is kept on the device, by `data.resident`."""
    if config.resident != "auto":
        return config.resident == "on"
    if device.type != "cuda" or not can_be_resident(transform):
        return False
    room = torch.cuda.get_device_properties(device).total_memory
    return rows * 3 * config.image_size**2 * MEMORY_SHARE <= room


@dataclass(frozen=True, eq=False)
class Resident:
    """All rows of a set by position, on the device."""

    images_NCHW: Tensor  # uint8, channels last in memory
    labels_N: Tensor  # int64
    ids_N: Tensor  # int64
    damaged: dict[int, str]  # names of images that could not be decoded, by position; black in images_NCHW

    @classmethod
    def load(cls, source: Source, data: DataConfig, device: torch.device) -> Resident:
        """Decode the set to the device.

        Raises DamagedDataError for a damaged block, StorageError for an object that cannot be read.
        """
        positions = np.arange(source.num_rows)
        keys = [Key(n, 0, part, 0) for n, part in enumerate(np.split(positions, positions[CHUNK::CHUNK]))]
        images, labels, ids = [], [], []
        damaged: dict[int, str] = {}
        for key, batch in zip(keys, view_batches(source, data, keys, 0), strict=True):
            images.append(batch.images_BCHW.to(device, memory_format=torch.channels_last))
            labels.append(batch.labels_B.to(device))
            ids.append(batch.ids_B.to(device))
            bad = key.positions[(batch.labels_B == DAMAGED).numpy()].tolist()
            damaged |= dict(zip(bad, batch.damaged, strict=True))
        whole = torch.cat(images).contiguous(memory_format=torch.channels_last)
        return cls(whole, torch.cat(labels), torch.cat(ids), damaged)

    def batch(self, key: Key, features: FeatureSource | None = None) -> LaneBatch:
        """Return the batch of a key, on the device. Cached features are read here, in this process.

        The nearest intact image takes the place of a damaged one. Raises DamagedDataError if none is intact.
        """
        device = self.images_NCHW.device
        positions, names = self._intact(key.positions)
        rows_B = torch.from_numpy(positions).to(device, non_blocking=True)
        images_BCHW = self.images_NCHW[rows_B].contiguous(memory_format=torch.channels_last)
        found = features.read(key.view, positions, self.ids[positions]) if features is not None else {}
        return LaneBatch(
            key.step,
            key.lane,
            images_BCHW,
            self.labels_N[rows_B],
            self.ids_N[rows_B],
            key.view,
            names,
            {label: torch.from_numpy(rows).to(device, non_blocking=True) for label, rows in found.items()},
        )

    @cached_property
    def ids(self) -> np.ndarray:
        """All ids on the host."""
        return self.ids_N.cpu().numpy()

    def _intact(self, positions: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
        """Return the positions with damaged ones replaced, and the names of the damaged images."""
        names = tuple(self.damaged[each] for each in positions.tolist() if each in self.damaged) if self.damaged else ()
        if not names:
            return np.ascontiguousarray(positions), ()
        places = [place for place, each in enumerate(positions.tolist()) if each not in self.damaged]
        if not places:
            raise none_intact(names)
        return positions[places][nearest_intact(places, len(positions))], names


# Kept for the process's next run with the same set: the transform and the decoded set.
_loaded: WeakKeyDictionary[Source, tuple[Transform, Resident]] = WeakKeyDictionary()


def resident(source: Source, data: DataConfig, device: torch.device) -> Resident:
    """Return the set on the device, loaded now (see `Resident.load`) or by an earlier run with this source and an equal
    transform."""
    transform = make_pipeline(data.pipeline, data.image_size).train
    by, known = _loaded.get(source, (None, None))
    if known is None or by != transform or known.images_NCHW.device != device:
        known = Resident.load(source, data, device)
        _loaded[source] = (transform, known)
    return known


def resident_batches(
    resident: Resident,
    order: Order,
    *,
    views: int,
    lanes: Sequence[int],
    start_step: int,
    stop_step: int,
    features: FeatureSource | None = None,
) -> Iterator[LaneBatch]:
    """Yield the same batches as loader.train_batches, from the device's memory."""
    for key in TrainKeys(order, views, tuple(lanes), start_step, stop_step):
        yield resident.batch(key, features)
