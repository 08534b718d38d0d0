"""Replayable augmentation: a view is a pure function of (seed, id, view number) and the image.

Pipelines take and return uint8 (3, H, W) tensors; the result is exactly (3, size, size). Normalisation happens later,
on the device. Random numbers come from torch's default generator, re-seeded for each sample, so no other thread may use
the generator at the same time: views are computed in processes, not threads. torchvision v2 draws from no other
generator; pipelines by import path have Python's and NumPy's re-seeded as well (pipelines.py). Transforms of whole
batches derive their numbers from the same three keys (batch_views.py).
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mimkd_ray.data.augment.decode import DECODING, Decoding, Encoded, decode
from mimkd_ray.data.augment.transforms import Transform, from_bytes

_three_numbers = struct.Struct("<QQQ").pack
_MASK = 2**64 - 1


@dataclass(frozen=True)
class View:
    """A training transform and the seed of its views. Picklable."""

    transform: Transform
    seed: int

    def apply(
        self,
        image: Encoded | np.ndarray | Tensor,
        id: int,
        view: int,
        how: Decoding = DECODING,
    ) -> Tensor:
        """Return view number `view` of the sample: the same bytes in any process. Restores the generator.

        An encoded image or an (H, W, 3) array is decoded here; a transform with a method `from_bytes` decodes encoded
        images itself and only as far as it needs. Raises DamagedImageError.
        """
        with torch.random.fork_rng(devices=()):
            return self.replay(image, id, view, how=how)

    def replay(
        self,
        image: Encoded | np.ndarray | Tensor,
        id: int,
        view: int,
        out: Tensor | None = None,
        how: Decoding = DECODING,
    ) -> Tensor:
        """Return what `apply` does, but leave the generator where the view took it.

        The result may be in `out` if that saves a copy (`transforms.from_bytes`). Costs 2 us beside decoding and
        transform, and 5 more if a transform draws from the generator.
        """
        torch.default_generator.manual_seed(hash32(self.seed, id, view))
        if isinstance(image, Tensor):
            return self.transform(image)
        if isinstance(image, np.ndarray):
            return self.transform(decode(image))
        return from_bytes(self.transform, image, out, how)


def hash32(seed: int, id: int, view: int) -> int:
    """Return 32 well-mixed bits of the three numbers."""
    # Not `seeds.derive`, whose numbers differ: teacher caches hold features of these views.
    packed = _three_numbers(seed & _MASK, id & _MASK, view & _MASK)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=4).digest(), "little")
