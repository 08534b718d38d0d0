"""Decoding of encoded images to uint8 pixels.

JPEGs are decoded by simplejpeg (libjpeg-turbo's accurate settings, the same pixels as Pillow's, checked in the tests).
Pillow decodes everything else, and every JPEG that simplejpeg rejects, and decides which images are damaged.
Microseconds on one core (EPYC, ImageNet photographs):

| JPEG | Pillow | simplejpeg |
|---|---|---|
| 341 x 256, 27 kB | 500 | 330 |
| 500 x 375, 67 kB | 1,040 | 700 |
| 2048 x 1536, 509 kB | 15,000 | 7,600; scaled by 1/2 5,900, by 1/4 5,100 |
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from mimkd_ray.data.augment.orientation import UPRIGHT, checked, orientation_of_jpeg, swaps_sides, turned

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage  # imported when it is needed

SHRINKS = (8, 4, 2)  # the scales by which both decoders can skip work, largest first
JPEG = b"\xff\xd8"  # its first bytes
PLAIN = ("YCbCr", "Gray", "RGB", "L")  # colour spaces, in simplejpeg's words and Pillow's, that both read alike
KINDS = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
    "AVIF",
    "PPM",
    "JPEG2000",
    "TGA",
)  # Pillow's names; TGA, which begins with no mark, is last
TWELVE_BITS = 4095  # the largest number of 12 bits

Encoded = bytes | memoryview


class DamagedImageError(Exception):
    """An image that cannot be decoded or is no image."""


@dataclass(frozen=True)
class Decoding:
    """How the encoded images of a data set become pixels."""

    max_pixels: int = 50_000_000
    """Images that declare more than this are damaged: a kilobyte may claim to be gigabytes."""
    exif: bool = True
    """Turn photographs upright by their orientation tags."""

    def check(self, height: int, width: int) -> None:
        """Raise DamagedImageError for a declared size that is too large."""
        if height * width > self.max_pixels:
            raise DamagedImageError(
                f"declares {width:,} x {height:,} pixels, more than data.max_pixels {self.max_pixels:,}"
            )


DECODING = Decoding()


def decode(image: Encoded | np.ndarray, shrink: int = 1, how: Decoding = DECODING) -> Tensor:
    """Return a uint8 RGB tensor (3, H, W) from an encoded image of one of KINDS, or from an (H, W, 3) array.

    `shrink` 2, 4 or 8 gives a JPEG of which `jpeg_size` knows the size at (ceil(H / shrink), ceil(W / shrink)), by
    leaving out high frequencies before they are computed; it is not for other images. Palette, grey, transparent and
    CMYK images become RGB (transparency is dropped); of several frames the first is taken. The memory layout stays
    height, width, channel: resizing is faster on it. Raises DamagedImageError, for too many pixels before they are
    decoded.
    """
    if isinstance(image, np.ndarray):
        return torch.from_numpy(image.copy()).permute(2, 0, 1)  # a copy: the set stays as it is, whatever follows
    pixels = _by_simplejpeg(image, shrink, how)
    if pixels is None:
        pixels = _by_pillow(image, shrink, how)
    if how.exif and image[:2] == JPEG:
        pixels = turned(pixels, orientation_of_jpeg(image))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def jpeg_size(data: Encoded, how: Decoding = DECODING) -> tuple[int, int] | None:
    """Return (H, W), upright if that is asked for, of a grey or colour JPEG from its header.

    None for anything else, and for more pixels than may be. Costs 2 us, and 26 us where Pillow must read it.
    """
    if data[:2] != JPEG:
        return None
    header = _read_header(data)
    if header is None:
        header = _read_header_by_pillow(data)
    if header is None:
        return None
    height, width, colours = header
    if colours not in PLAIN or height * width > how.max_pixels:
        return None
    return (width, height) if how.exif and swaps_sides(orientation_of_jpeg(data)) else (height, width)


def _read_header(data: Encoded) -> tuple[int, int, str] | None:
    """Return height, width and colour space, None if simplejpeg cannot read the header."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # raised for good images of unusual subsampling, too
        return None
    return height, width, colours


def _read_header_by_pillow(data: Encoded) -> tuple[int, int, str] | None:
    try:
        with _opened(data, ("JPEG",)) as opened:
            return opened.height, opened.width, opened.mode
    except Exception:  # `decode` reports whatever is wrong with it
        return None


def _by_simplejpeg(data: Encoded, shrink: int, how: Decoding) -> np.ndarray | None:
    """Return (H, W, 3), or None where Pillow must decide: not JPEG, CMYK, or anything wrong with it."""
    header = _read_header(data) if data[:2] == JPEG else None
    if header is None:
        return None
    height, width, colours = header
    how.check(height, width)
    if colours not in PLAIN:
        return None
    try:
        if shrink == 1:
            return simplejpeg.decode_jpeg(data, "RGB")
        height, width = -(-height // shrink), -(-width // shrink)
        return simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, min_factor=shrink)
    except ValueError:  # it stops at faults that Pillow can ignore
        return None


def _opened(data: Encoded, kinds: tuple[str, ...]) -> PillowImage:
    """Open an image, of which Pillow reads no pixel yet."""
    from PIL import Image

    with warnings.catch_warnings():
        # Pillow's warning of many pixels: `Decoding.check` says how many may be.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=kinds)


@cache
def _kinds() -> tuple[str, ...]:
    """Return those of KINDS that this Pillow knows."""
    from PIL import Image

    Image.init()
    return tuple(kind for kind in KINDS if kind in Image.OPEN)


def _by_pillow(data: Encoded, shrink: int, how: Decoding) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with _opened(data, _kinds()) as opened:
            how.check(opened.height, opened.width)
            if shrink > 1:
                opened.draft(None, (opened.width // shrink, opened.height // shrink))
            pixels = rgb_pixels(opened)
            # Last: a PNG may have its tag behind its pixels, and a TIFF is upright by now, and says so.
            return turned(pixels, _orientation(opened)) if how.exif and data[:2] != JPEG else pixels
    except (MemoryError, DamagedImageError):
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, far above the default of ours
        raise DamagedImageError(f"declares more pixels than data.max_pixels {how.max_pixels:,}: {error}") from error
    except UnidentifiedImageError as error:  # its own text has the address of an object, and is never the same twice
        raise DamagedImageError(f"no {', '.join(KINDS[:-1])} or {KINDS[-1]}" if data else "empty") from error
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error and others
        raise DamagedImageError(f"{type(error).__name__}: {error}" if data else "empty") from error


def _orientation(opened: PillowImage) -> int:
    try:
        return checked(opened.getexif().get(0x0112, UPRIGHT))
    except Exception:  # a broken tag is no tag, whatever Pillow finds wrong with it
        return UPRIGHT


def rgb_pixels(image: PillowImage) -> np.ndarray:
    """Return the uint8 pixels (H, W, 3) of a Pillow image of any mode, as :func:`decode` has them.

    Of 16 bits the upper 8 are taken. An image without a value above 4095 is taken for one of 12 bits, as scanners and
    microscopes write them: it would be black. Raises DamagedImageError for values whose range nobody tells.
    """
    if image.mode == "F":
        raise DamagedImageError("has floating values, whose range nobody tells: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip it to white
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 0xFFFF:
            raise DamagedImageError(f"has values from {low:,} to {high:,}: convert it to 8 or 16 bits")
        if image.mode.startswith("I;16") or high > 0xFF:
            grey = (values >> (4 if high <= TWELVE_BITS else 8)).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        return np.array(image.convert("RGBA"))[:, :, :3].copy()
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
