"""The transforms of single images: uint8 (3, H, W) to exactly (3, size, size).

Pixels are those of torchvision v2, without its dispatch: a crop is copied to height, width, channel order, on which
torch's uint8 resize is fastest. torchvision itself is not imported, because that takes longer than a short run's
decoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimkd_ray.data.augment.decode import DECODING, SHRINKS, DamagedImageError, Decoding, Encoded, decode, jpeg_size

Transform = Callable[[Tensor], Tensor]

AREA = (0.08, 1.0)  # share of the image's area that a random crop takes
ASPECT = (3 / 4, 4 / 3)  # its width over its height
MOST_RESIZED = 50_000_000  # pixels that an image is resized to before its centre is taken: 150 MB
LOG_ASPECT = tuple(torch.log(torch.tensor(ASPECT)).tolist())  # float32, as torchvision has it


def from_bytes(transform: Transform, data: Encoded, out: Tensor | None = None, how: Decoding = DECODING) -> Tensor:
    """Return the transform of an encoded image; one with such a method itself decodes only what it needs.

    It may put the result where it is wanted, in `out`: (3, size, size), any layout.
    """
    if hasattr(transform, "from_bytes"):
        return transform.from_bytes(data, out, how)
    return transform(decode(data, how=how))


def resize(image: Tensor, height: int, width: int, out: Tensor | None = None) -> Tensor:
    """Return `image` at (3, height, width), antialiased, bilinear, as torchvision v2 resizes uint8; in `out`, if given.

    Returns the image itself if it has that size. 70 us from 200 x 220, a part of a larger image, to 224 x 224.
    """
    if image.shape[1:] == (height, width):
        return image
    if out is None:
        out = torch.empty((height, width, 3), dtype=torch.uint8).permute(2, 0, 1)
    # With a batch axis whose stride spans the image, torch keeps the layout; without one it repacks (60 us more).
    pixels_BCHW = image.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
    # The operator that torch's interpolate calls; interpolate itself has no argument for the output.
    torch.ops.aten._upsample_bilinear2d_aa.out(pixels_BCHW, [height, width], False, None, None, out=out[None])
    return out


class Crop(NamedTuple):
    """A rectangle of an image, in pixels, and its mirroring."""

    top: int
    left: int
    height: int
    width: int
    flip: bool

    def shrunk(self, shrink: int) -> Crop:
        """Return the rectangle in an image scaled by 1/shrink, its edges rounded to whole pixels."""
        top, bottom, left, right = (
            (edge + shrink // 2) // shrink
            for edge in (self.top, self.top + self.height, self.left, self.left + self.width)
        )
        return Crop(top, left, bottom - top, right - left, self.flip)


@dataclass(frozen=True)
class ResizedCropFlip:
    """A random part of the image, resized to `size`, mirrored half of the time: ImageNet's training view.

    Random numbers and pixels are those of torchvision v2's RandomResizedCrop(size) and RandomHorizontalFlip, from
    torch's default generator. 160 us for a photograph of short side 256 at size 224; v2 takes 300 us, Pillow 620 us.
    """

    size: int

    def __call__(self, image: Tensor) -> Tensor:
        return self._take(image, self.draw(image.shape[1], image.shape[2]))

    def from_bytes(self, data: Encoded, out: Tensor | None = None, how: Decoding = DECODING) -> Tensor:
        """Return the view of an encoded image, in `out` where that saves a copy. Draws first, and decodes no finer than
        the crop needs.

        The pixels are those of `self(decode(data))`, unless the crop of a JPEG is at least twice `size` in both
        directions: then it is decoded at 1/2, 1/4 or 1/8 and its edges move to whole pixels of that scale. Compared
        with full decoding of the moved crop, pixels differ by 1.5, 1.9 and 2.5 levels on average and at most 58 (at
        sharp edges); compared with the crop as drawn by 3.6, 4.3 and 5.2, at most 119 (500 ImageNet photographs, sizes
        112, 56 and 28). At size 224 images of 500 x 375 are never decoded smaller; a view of 1024 x 768 takes 2.6 ms
        instead of 3.1, one of 2048 x 1536 6.1 ms instead of 9.5.
        """
        bounds = jpeg_size(data, how)
        if bounds is None:
            return self(decode(data, how=how))
        crop = self.draw(*bounds)
        shrink = next((s for s in SHRINKS if min(crop.height, crop.width) >= s * self.size), 1)
        return self._take(decode(data, shrink, how), crop.shrunk(shrink), out)

    def draw(self, height: int, width: int) -> Crop:
        """Draw a crop of an image of this size: ten tries for a crop that fits, else the central one. 12 us."""
        number = torch.empty(1)  # float32, because torchvision draws in it
        for _ in range(10):
            area = height * width * number.uniform_(*AREA).item()
            aspect = number.uniform_(*LOG_ASPECT).exp_().item()
            crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = int(torch.randint(0, height - crop_height + 1, (1,)))
                left = int(torch.randint(0, width - crop_width + 1, (1,)))
                break
        else:
            crop_height = min(height, round(width / ASPECT[0]))
            crop_width = min(width, round(height * ASPECT[1]))
            top, left = (height - crop_height) // 2, (width - crop_width) // 2
        return Crop(top, left, crop_height, crop_width, number.uniform_().item() < 0.5)

    def _take(self, image: Tensor, crop: Crop, out: Tensor | None = None) -> Tensor:
        part = image[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        # Mirrored before resizing: the pixels are the same, because resizing is symmetric, and the result lands in
        # `out`.
        return resize(part.flip(2) if crop.flip else part, self.size, self.size, out)


@dataclass(frozen=True)
class Then:
    """A transform that applies `first` and then `rest`."""

    first: Transform
    rest: Transform

    def __call__(self, image: Tensor) -> Tensor:
        return self.rest(self.first(image))

    def from_bytes(self, data: Encoded, out: Tensor | None = None, how: Decoding = DECODING) -> Tensor:
        """Return the view of an encoded image; see ResizedCropFlip.from_bytes."""
        return self.rest(from_bytes(self.first, data, how=how))


@dataclass(frozen=True)
class OnPillow:
    """A torchvision v2 transform of Pillow images, such as TrivialAugmentWide, applied to tensors.

    The random numbers are those on a tensor and, per operation, the pixels differ by at most one level (rotations and
    shears use another neighbour for some pixels). At 224 x 224 TrivialAugmentWide takes 400 us, and 930 us on the
    tensor; RandAugment 620 us and 1,750 us; 80 us of each is the conversion.
    """

    transform: Callable[[Any], Any]

    def __call__(self, image: Tensor) -> Tensor:
        from PIL import Image

        result = self.transform(Image.fromarray(image.permute(1, 2, 0).numpy()))
        return torch.from_numpy(np.array(result)).permute(2, 0, 1)


@dataclass(frozen=True)
class FitSize:
    """Resize to (size, size) if the image has another size; the aspect is not kept."""

    size: int

    def __call__(self, image: Tensor) -> Tensor:
        return resize(image, self.size, self.size)


def can_be_resident(transform: Transform) -> bool:
    """Return whether a training transform gives the same pixels in every view and so has to run only once."""
    return isinstance(transform, FitSize)


@dataclass(frozen=True)
class CentreCrop:
    """Resize the short side to size * 256/224, crop the centre: ImageNet's evaluation, as torchvision v2 does it.

    A strip whose long side would then take all memory is damaged: 60,000 x 1 pixels at size 224 make 11.8 GB.
    6 us for an image of short side 256 at size 224, which is only cropped (v2: 19 us).
    """

    size: int

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        short = round(self.size * 256 / 224)
        long = int(short * width / height) if height <= width else int(short * height / width)
        if short * long > max(MOST_RESIZED, 4 * short**2):
            raise DamagedImageError(f"has {width:,} x {height:,} pixels: too long a strip to be resized for its centre")
        image = resize(image, short, long) if height <= width else resize(image, long, short)
        # Half a pixel goes to the even neighbour, as torchvision rounds.
        top, left = (round((side - self.size) / 2) for side in image.shape[1:])
        return image[:, top : top + self.size, left : left + self.size]
