"""From encoded images to uint8 pixels.

JPEGs go to simplejpeg where it is installed (libjpeg-turbo's accurate settings, the same pixels as Pillow's, checked
in the tests); everything else, and every JPEG that simplejpeg finds fault with, goes to Pillow, which has the last word
on what is damaged. Microseconds on one core (EPYC, ImageNet photographs):

| JPEG | Pillow | simplejpeg |
|---|---|---|
| 341 x 256, 27 kB | 500 | 330 |
| 500 x 375, 67 kB | 1,040 | 700 |
| 2048 x 1536, 509 kB | 15,000 | 7,600; scaled by 1/2 5,900, by 1/4 5,100 |
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

try:
    import simplejpeg  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ImportError:  # a platform without its wheel: Pillow gives the same pixels, more slowly
    simplejpeg = None  # type: ignore[assignment, unused-ignore]

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage  # imported when it is needed

SHRINKS = (8, 4, 2)  # the scales by which both decoders can skip work, largest first
PLAIN = ("YCbCr", "Gray", "RGB", "L")  # colour spaces, in simplejpeg's words and Pillow's, that both read alike
MAX_PIXELS = 89_478_485  # above this Pillow decides: it refuses what looks like a decompression bomb


Encoded = bytes | memoryview


class DamagedImageError(Exception):
    """An image that cannot be decoded or is no image."""


def decode(image: Encoded | np.ndarray, shrink: int = 1) -> Tensor:
    """Return a uint8 RGB tensor (3, H, W) from an encoded JPEG, PNG or WebP, or from an (H, W, 3) array.

    `shrink` 2, 4 or 8 gives a JPEG of which `jpeg_size` knows the size at (ceil(H / shrink), ceil(W / shrink)), by
    leaving out high frequencies before they are computed; it is not for other images. Palette, grey, transparent and
    CMYK images become RGB (transparency is dropped, orientation tags are ignored). The memory layout stays height,
    width, channel: resizing is faster on it. Raises DamagedImageError.
    """
    if isinstance(image, np.ndarray):
        return torch.from_numpy(image.copy()).permute(2, 0, 1)  # a copy: the set stays as it is, whatever follows
    pixels = _by_simplejpeg(image, shrink)
    if pixels is None:
        pixels = _by_pillow(image, shrink)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def has_simplejpeg() -> bool:
    """Whether JPEGs are decoded the faster way."""
    return simplejpeg is not None


def jpeg_size(data: Encoded) -> tuple[int, int] | None:
    """Return (H, W) of a grey or colour JPEG of at most MAX_PIXELS from its header, or None for anything else.

    Costs 1 us with simplejpeg, 25 us with Pillow.
    """
    if data[:2] != b"\xff\xd8":
        return None
    header = _read_header(data)
    if header is None:
        header = _read_header_by_pillow(data)
    if header is None:
        return None
    height, width, colours = header
    return (height, width) if colours in PLAIN and height * width <= MAX_PIXELS else None


def _read_header(data: Encoded) -> tuple[int, int, str] | None:
    """Return height, width and colour space, None where simplejpeg is missing or cannot tell."""
    if simplejpeg is None:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # also for good images of unusual subsampling
        return None
    return height, width, colours


def _read_header_by_pillow(data: Encoded) -> tuple[int, int, str] | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as opened:
            return opened.height, opened.width, opened.mode
    except Exception:  # whatever is wrong with it, `decode` says so
        return None


def _by_simplejpeg(data: Encoded, shrink: int) -> np.ndarray | None:
    """Return (H, W, 3), or None where Pillow must decide: not JPEG, CMYK, huge, or anything wrong with it."""
    header = _read_header(data) if data[:2] == b"\xff\xd8" else None
    if header is None:
        return None
    height, width, colours = header
    if colours not in PLAIN or height * width > MAX_PIXELS:
        return None
    try:
        if shrink == 1:
            return simplejpeg.decode_jpeg(data, "RGB")
        height, width = -(-height // shrink), -(-width // shrink)
        return simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, min_factor=shrink)
    except ValueError:  # it stops at faults that Pillow can overlook
        return None


def _by_pillow(data: Encoded, shrink: int) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as opened:
            if shrink > 1:
                opened.draft(None, (opened.width // shrink, opened.height // shrink))
            return rgb_pixels(opened)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:  # its own text has the address of an object, and is never the same twice
        raise DamagedImageError("no JPEG, PNG or WebP" if data else "empty") from error
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error and others
        raise DamagedImageError(f"{type(error).__name__}: {error}" if data else "empty") from error


def rgb_pixels(image: PillowImage) -> np.ndarray:
    """Return the uint8 pixels (H, W, 3) of a Pillow image of any mode, as :func:`decode` has them."""
    if image.mode.startswith("I;16"):  # 16-bit grey: Pillow would clip it to white
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        return np.array(image.convert("RGBA"))[:, :, :3].copy()
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
