"""Decoding of encoded images to uint8 pixels.

JPEGs are decoded by simplejpeg if it is installed (libjpeg-turbo's accurate settings, the same pixels as Pillow's,
checked in the tests). Pillow decodes everything else, and every JPEG that simplejpeg rejects, and decides which images
are damaged. Microseconds on one core (EPYC, ImageNet photographs):

| JPEG | Pillow | simplejpeg | |---|---|---| | 341 x 256, 27 kB | 500 | 330 | | 500 x 375, 67 kB | 1,040 | 700 | | 2048
x 1536, 509 kB | 15,000 | 7,600; scaled by 1/2 5,900, by 1/4 5,100 |
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

try:
    import simplejpeg  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ImportError:  # a platform without its wheel: Pillow gives the same pixels more slowly
    simplejpeg = None  # type: ignore[assignment, unused-ignore]

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage  # imported when it is needed

SHRINKS = (8, 4, 2)  # the scales by which both decoders can skip work, largest first
PLAIN = ("YCbCr", "Gray", "RGB", "L")  # colour spaces, in the names of simplejpeg and Pillow, that both decode equally
MAX_PIXELS = 89_478_485  # above this Pillow decides: it refuses suspected decompression bombs


Encoded = bytes | memoryview


class DamagedImageError(Exception):
    """An image that cannot be decoded or is no image."""


def decode(image: Encoded | np.ndarray, shrink: int = 1) -> Tensor:
    """Return a uint8 RGB tensor (3, H, W) from an encoded JPEG, PNG or WebP, or from an (H, W, 3) array.

    `shrink` 2, 4 or 8 decodes a JPEG whose size `jpeg_size` knows at (ceil(H / shrink), ceil(W / shrink)), by leaving
    out high frequencies before they are computed; it does not apply to other images. Palette, grey, transparent and
    CMYK images become RGB (transparency is dropped, orientation tags are ignored). The memory layout stays height,
    width, channel, which is faster to resize. Raises DamagedImageError.
    """
    if isinstance(image, np.ndarray):
        return torch.from_numpy(image.copy()).permute(2, 0, 1)  # a copy: later changes must not affect the set
    pixels = _by_simplejpeg(image, shrink)
    if pixels is None:
        pixels = _by_pillow(image, shrink)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def has_simplejpeg() -> bool:
    """Return whether JPEGs are decoded by simplejpeg."""
    return simplejpeg is not None


def jpeg_size(data: Encoded) -> tuple[int, int] | None:
    """Return (H, W) of a grey or colour JPEG of at most MAX_PIXELS from its header, None for anything else.

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
    """Return height, width and colour space, None if simplejpeg is missing or cannot read the header."""
    if simplejpeg is None:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # raised for good images of unusual subsampling, too
        return None
    return height, width, colours


def _read_header_by_pillow(data: Encoded) -> tuple[int, int, str] | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as opened:
            return opened.height, opened.width, opened.mode
    except Exception:  # `decode` reports whatever is wrong with it
        return None


def _by_simplejpeg(data: Encoded, shrink: int) -> np.ndarray | None:
    """Return (H, W, 3), or None if Pillow must decide: not JPEG, CMYK, huge, or any fault."""
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
    except ValueError:  # it stops at faults that Pillow can ignore
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
    except UnidentifiedImageError as error:  # its own text contains an object's address, which differs each time
        raise DamagedImageError("no JPEG, PNG or WebP" if data else "empty") from error
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error and others
        raise DamagedImageError(f"{type(error).__name__}: {error}" if data else "empty") from error


def rgb_pixels(image: PillowImage) -> np.ndarray:
    """Return the uint8 pixels (H, W, 3) of a Pillow image of any mode, equal to those of :func:`decode`."""
    if image.mode.startswith("I;16"):  # 16-bit grey: Pillow would clip it to white
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        return np.array(image.convert("RGBA"))[:, :, :3].copy()
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
