"""Orientation tags of photographs: how the camera was held (1 to 8, as in Exif), and the pixels turned upright."""

from __future__ import annotations

import struct

import numpy as np

UPRIGHT = 1
_TAG = 0x0112
_BYTE_ORDERS = {b"II": "<", b"MM": ">"}
_NUMBERS = {3: "H", 4: "I"}  # by the type of an entry: SHORT, LONG
_ENTRY_BYTES = 12


def swaps_sides(orientation: int) -> bool:
    """Whether turning upright makes the height the width."""
    return orientation >= 5


def turned(pixels_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """Return the pixels upright, contiguous; the array itself where nothing is to be done."""
    if orientation == UPRIGHT:
        return pixels_HWC
    if swaps_sides(orientation):
        pixels_HWC = pixels_HWC.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels_HWC = pixels_HWC[::-1]
    if orientation in (2, 3, 6, 7):
        pixels_HWC = pixels_HWC[:, ::-1]
    return np.ascontiguousarray(pixels_HWC)


def orientation_of_jpeg(data: bytes | memoryview) -> int:
    """Return the orientation that a JPEG's Exif segment tells; UPRIGHT where there is none, or a broken one.

    Looks at the segments in front of the image's own, where the standard wants it: 1 us.
    """
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE) or length < 2:  # neither of an application nor a comment
            break
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return _of_tiff(bytes(data[at + 10 : at + 2 + length]))
        at += 2 + length
    return UPRIGHT


def _of_tiff(tiff: bytes) -> int:
    order = _BYTE_ORDERS.get(tiff[:2])
    if order is None:
        return UPRIGHT
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(start + 2, start + 2 + count * _ENTRY_BYTES, _ENTRY_BYTES):
            tag, kind = struct.unpack_from(order + "HH", tiff, entry)
            if tag == _TAG and kind in _NUMBERS:
                return checked(struct.unpack_from(order + _NUMBERS[kind], tiff, entry + 8)[0])
    except struct.error:  # the segment ends before its directory does
        return UPRIGHT
    return UPRIGHT


def checked(orientation: object) -> int:
    """Return the number of a tag if it is one of the eight, else UPRIGHT."""
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else UPRIGHT
