"""Decoding and augmentation. A view is a pure function of (seed, id, view number).

Pipelines take and give uint8 (3, H, W) tensors; the result is exactly (3, size, size). Normalisation is not
here: it happens on the device. Random numbers come from torch's default generator, re-seeded for each sample,
so the generator must not be in use by another thread meanwhile: views are made in processes, not threads.

torchvision is imported only by pipelines that need it: importing it takes longer than a short run's whole
decoding.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimkd_ray.errors import UserError, nearest

Transform = Callable[[Tensor], Tensor]


class Pair(NamedTuple):
    """The transform of training and that of evaluation (which draws no random numbers)."""

    train: Transform
    eval: Transform


class DamagedImageError(Exception):
    """An image that cannot be decoded or is no image."""


@dataclass(frozen=True)
class View:
    """A training transform and the seed under which it is replayed. Picklable."""

    transform: Transform
    seed: int

    def apply(self, image: Tensor, id: int, view: int) -> Tensor:
        """Return view number `view` of the sample: the same bytes in any process. Keeps the generator."""
        generator = torch.default_generator
        state = generator.get_state()  # 1 us, and the model's own random numbers go on undisturbed
        generator.manual_seed(hash32(self.seed, id, view))
        try:
            return self.transform(image)
        finally:
            generator.set_state(state)


def hash32(seed: int, id: int, view: int) -> int:
    """Return 32 well-mixed bits of the three numbers."""
    packed = struct.pack("<QQQ", seed % 2**64, id % 2**64, view % 2**64)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=4).digest(), "little")


def decode(image: bytes | np.ndarray) -> Tensor:
    """Return a uint8 RGB tensor (3, H, W) from an encoded JPEG, PNG or WebP, or from an (H, W, 3) array.

    Palette, grey, transparent and CMYK images become RGB (transparency is dropped, orientation tags are
    ignored). The memory layout stays height, width, channel: resizing is faster on it. Raises
    DamagedImageError.
    """
    if isinstance(image, np.ndarray):
        return torch.from_numpy(image.copy()).permute(2, 0, 1)  # a copy: the set stays as it is, whatever follows
    from PIL import Image

    try:
        with Image.open(_as_file(image), formats=("JPEG", "PNG", "WEBP")) as opened:
            if opened.mode.startswith("I;16"):  # 16-bit grey: Pillow would clip it to white
                pixels = np.repeat((np.asarray(opened) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
            elif opened.mode == "P" and "transparency" in opened.info:
                pixels = np.array(opened.convert("RGBA"))[:, :, :3].copy()
            else:
                pixels = np.array(opened if opened.mode == "RGB" else opened.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error and others
        raise DamagedImageError(f"{type(error).__name__}: {error}" if image else "empty") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _as_file(data: bytes) -> Any:
    import io

    return io.BytesIO(data)


@dataclass(frozen=True)
class CropFlip:
    """Pad with zeros, crop `size` at random, mirror half of the time.

    Draws and result are those of torchvision v2's RandomCrop(size, padding) and RandomHorizontalFlip, at a
    quarter of their time. An image of another size is resized first.
    """

    size: int
    padding: int
    flip: bool

    def __call__(self, image: Tensor) -> Tensor:
        size, padding = self.size, self.padding
        image = FitSize(size)(image)
        top, left = torch.randint(0, 2 * padding + 1, (2,)).tolist()
        out = torch.zeros((3, size, size), dtype=torch.uint8)
        # The part of the padded image that the crop shows, in the coordinates of the image and of the result.
        y, x = top - padding, left - padding
        out[:, max(0, -y) : size - max(0, y), max(0, -x) : size - max(0, x)] = image[
            :, max(0, y) : size + min(0, y), max(0, x) : size + min(0, x)
        ]
        if self.flip and torch.rand(1).item() < 0.5:
            out = out.flip(2)
        return out


@dataclass(frozen=True)
class FitSize:
    """Resize to (size, size) if the image has another size; the aspect is not kept."""

    size: int

    def __call__(self, image: Tensor) -> Tensor:
        if image.shape[-2:] == (self.size, self.size):
            return image
        from torchvision.transforms.v2 import functional

        return functional.resize(image, [self.size, self.size], antialias=True)


@dataclass(frozen=True)
class CentreCrop:
    """Resize the short side to size * 256/224, crop the centre: ImageNet's evaluation."""

    size: int

    def __call__(self, image: Tensor) -> Tensor:
        from torchvision.transforms.v2 import functional

        image = functional.resize(image, [round(self.size * 256 / 224)], antialias=True)
        return functional.center_crop(image, [self.size, self.size])


def _imagenet(size: int, trivial_augment: bool = False) -> Pair:
    from torchvision.transforms import v2

    steps: list[Any] = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    if trivial_augment:
        steps.append(v2.TrivialAugmentWide())
    return Pair(v2.Compose(steps), CentreCrop(size))


def _crop_flip(size: int, padding: int, flip: bool) -> Pair:
    return Pair(CropFlip(size, padding, flip), FitSize(size))


def _none(size: int) -> Pair:
    return Pair(FitSize(size), FitSize(size))


PIPELINES: dict[str, Callable[[int], Pair]] = {
    "imagenet": _imagenet,
    "imagenet_ta": partial(_imagenet, trivial_augment=True),
    "cifar": partial(_crop_flip, padding=4, flip=True),
    "digits": partial(_crop_flip, padding=1, flip=False),
    "none": _none,
}


def make_pipeline(name: str, image_size: int) -> Pair:
    """Build the named pipeline for images of `image_size` squared. Raises UserError for an unknown name."""
    if name not in PIPELINES:
        known = ", ".join(PIPELINES)
        raise UserError(f"pipeline '{name}' is unknown{nearest(name, PIPELINES)}; there are: {known}")
    return PIPELINES[name](image_size)
