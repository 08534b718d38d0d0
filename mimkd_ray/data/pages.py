"""Where the values of an uncompressed Parquet column of bytes lie: rows are then read without decoding the block.

A column chunk is a row of pages: a header in Thrift's compact protocol, and behind it (version 1, optional column)
the definition levels and the values, each a 32-bit length and its bytes (github.com/apache/parquet-format,
README.md, Encodings.md and src/main/thrift/parquet.thrift). Only this plain form is read here, which is how prepared
sets and most image sets are written; anything else is left to Arrow.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np

_LENGTH = struct.Struct("<I")
_DATA_PAGE, _PLAIN = 0, 0  # values of parquet.thrift's PageType and Encoding
# Field numbers of PageHeader and of its DataPageHeader.
_TYPE, _COMPRESSED_SIZE, _DATA_PAGE_HEADER = 1, 3, 5
_NUM_VALUES, _ENCODING = 1, 2
# Types of Thrift's compact protocol.
_TRUE, _FALSE, _I16, _I32, _I64, _DOUBLE, _BINARY, _STRUCT = 1, 2, 4, 5, 6, 7, 8, 12


class Places(NamedTuple):
    """The values of a column chunk: `lengths` bytes at `offsets` from its first byte on (both int64, by row)."""

    offsets: np.ndarray
    lengths: np.ndarray


def find_values(chunk: memoryview, rows: int, optional: bool) -> Places | None:
    """Return the places of all `rows` values of a chunk; None if it is not of the plain form, or has nulls.

    `optional`: the column's greatest definition level is above 0. It must not be repeated. 0.2 us a row.
    """
    offsets: list[int] = []
    lengths: list[int] = []
    at = 0
    try:
        while len(offsets) < rows:
            header, at = _read_struct(chunk, at)
            if header[_TYPE] != _DATA_PAGE or header[_DATA_PAGE_HEADER][_ENCODING] != _PLAIN:
                return None
            end = at + header[_COMPRESSED_SIZE]
            if optional:
                at += _LENGTH.size + _LENGTH.unpack_from(chunk, at)[0]
            for _ in range(header[_DATA_PAGE_HEADER][_NUM_VALUES]):
                (length,) = _LENGTH.unpack_from(chunk, at)
                offsets.append(at + _LENGTH.size)
                lengths.append(length)
                at += _LENGTH.size + length
            if at != end:  # nulls are counted and not stored
                return None
    except (KeyError, IndexError, TypeError, ValueError, struct.error):
        return None
    return Places(np.array(offsets), np.array(lengths)) if len(offsets) == rows and at <= len(chunk) else None


def _read_struct(data: memoryview, at: int) -> tuple[dict[int, Any], int]:
    """Return {field number: value} of a Thrift struct, and where it ends. Raises ValueError for types not in a page
    header."""
    fields: dict[int, Any] = {}
    number = 0
    while True:
        first = data[at]
        at += 1
        kind = first & 15
        if kind == 0:
            return fields, at
        if first >> 4:
            number += first >> 4
        else:
            number, at = _read_integer(data, at)
        value: Any
        if kind in (_TRUE, _FALSE):
            value = kind == _TRUE
        elif kind in (_I16, _I32, _I64):
            value, at = _read_integer(data, at)
        elif kind == _DOUBLE:
            value, at = None, at + 8
        elif kind == _BINARY:
            size, at = _read_varint(data, at)
            value, at = None, at + size
        elif kind == _STRUCT:
            value, at = _read_struct(data, at)
        else:
            raise ValueError(f"Thrift type {kind}")
        fields[number] = value


def _read_integer(data: memoryview, at: int) -> tuple[int, int]:
    """Return a signed ("zigzag") integer and where it ends."""
    value, at = _read_varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
