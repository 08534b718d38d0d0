"""Replayable augmentation: a view is a pure function of (seed, id, view number) and the image.

Pipelines take and give uint8 (3, H, W) tensors; the result is exactly (3, size, size). Normalisation is not here: it
happens on the device. Random numbers come from torch's default generator, re-seeded for each sample, so the generator
must not be in use by another thread meanwhile: views are made in processes, not threads. torchvision v2 draws from no
other generator; pipelines by import path have Python's and NumPy's re-seeded as well (pipelines.py). Transforms of
whole batches have their numbers from the same three keys (batch_views.py).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mimkd_ray.data.augment.batch_views import BatchTransform
from mimkd_ray.data.augment.decode import DECODING, DamagedImageError, Decoding, Encoded, decode
from mimkd_ray.data.augment.pipelines import PIPELINES, Pipeline, make_pipeline
from mimkd_ray.data.augment.transforms import CentreCrop, FitSize, ResizedCropFlip, Transform, from_bytes

__all__ = [
    "PIPELINES",
    "BatchTransform",
    "CentreCrop",
    "DamagedImageError",
    "FitSize",
    "Pipeline",
    "ResizedCropFlip",
    "Transform",
    "View",
    "decode",
    "generator_kept",
    "hash32",
    "make_pipeline",
]

_three_numbers = struct.Struct("<QQQ").pack
_MASK = 2**64 - 1


@dataclass(frozen=True)
class View:
    """A training transform and the seed under which it is replayed. Picklable."""

    transform: Transform
    seed: int

    def apply(
        self,
        image: Encoded | np.ndarray | Tensor,
        id: int,
        view: int,
        out: Tensor | None = None,
        how: Decoding = DECODING,
    ) -> Tensor:
        """Return view number `view` of the sample: the same bytes in any process. Keeps the generator.

        The result may be in `out`, where that saves a copy (`transforms.from_bytes`).

        An encoded image or an (H, W, 3) array is decoded here; a transform with a method `from_bytes` decodes encoded
        images itself, so that it need not decode more than it uses. Raises DamagedImageError.
        """
        with generator_kept():
            return self.replay(image, id, view, out, how)

    def replay(
        self,
        image: Encoded | np.ndarray | Tensor,
        id: int,
        view: int,
        out: Tensor | None = None,
        how: Decoding = DECODING,
    ) -> Tensor:
        """Return what `apply` does, but leave the generator where the view took it; see `generator_kept`.

        Costs 2 us beside decoding and transform, and 5 more where a transform draws from the generator.
        """
        torch.default_generator.manual_seed(hash32(self.seed, id, view))
        if isinstance(image, Tensor):
            return self.transform(image)
        if isinstance(image, np.ndarray):
            return self.transform(decode(image))
        return from_bytes(self.transform, image, out, how)


@contextmanager
def generator_kept() -> Iterator[None]:
    """Afterwards the model's own random numbers go on undisturbed. Once for a batch: 2 us, which count for an image."""
    generator = torch.default_generator
    state = generator.get_state()
    try:
        yield
    finally:
        generator.set_state(state)


def hash32(seed: int, id: int, view: int) -> int:
    """Return 32 well-mixed bits of the three numbers."""
    # Not `seeds.derive`, which gives other numbers: teacher caches hold features of these views.
    packed = _three_numbers(seed & _MASK, id & _MASK, view & _MASK)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=4).digest(), "little")
