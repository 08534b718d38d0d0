"""The notation of a tap's codec in a config, such as "pool4,pca256,uint8"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from mimkd_ray.errors import UserError

StoredType = Literal["uint8", "fp16", "bf16", "fp32"]
STORED_TYPES: tuple[StoredType, ...] = get_args(StoredType)

_PART = re.compile(r"(?P<what>pool|pca)(?P<most>[1-9]\d*)")

_TOP = re.compile(r"top([1-9]\d*)")


@dataclass(frozen=True)
class CodecSpec:
    """The steps of a codec, without fitted values."""

    kind: StoredType
    pool: int = 0
    """Average-pool a map to at most this many rows and columns; 0: no pooling."""
    pca: int = 0
    """Keep at most this many principal components of the channels; 0: keep the channels."""
    top: int = 0
    """For logits: keep this many, the largest, and the mass of the others; 0: keep all."""

    def __str__(self) -> str:
        if self.top:
            return f"top{self.top}"
        parts = [f"pool{self.pool}"] * bool(self.pool) + [f"pca{self.pca}"] * bool(self.pca)
        return ",".join([*parts, self.kind])


DEFAULT_MAP, DEFAULT_VECTOR = CodecSpec("uint8", pool=4, pca=256), CodecSpec("fp16")
"""Default codecs. A map takes at most 4,096 bytes, whatever its size. Measured errors: benchmarks/cache.py."""


def parse_spec(text: str) -> CodecSpec:
    """Parse "pool4,pca256,uint8": the last part is the stored type, the other parts are optional. Raises UserError."""
    *steps, kind = text.split(",")
    found: dict[str, int] = {}
    for step in steps:
        match = _PART.fullmatch(step)
        if match is None or match["what"] in found or (match["what"] == "pool" and found):
            raise _unreadable(text)
        found[match["what"]] = int(match["most"])
    if kind not in STORED_TYPES:
        raise _unreadable(text)
    return CodecSpec(kind, **found)


def parse_logits(text: str) -> CodecSpec:
    """Parse the storage of logits: "fp16", "bf16" or "fp32", or "top32". Raises UserError."""
    match = _TOP.fullmatch(text)
    if match:
        return CodecSpec("fp16", top=int(match[1]))
    if text in STORED_TYPES and text != "uint8":
        return CodecSpec(text)
    raise UserError(
        f"cache.logits {text!r} cannot be read: give fp16, bf16 or fp32 for all logits, or topK for the K largest and "
        "the mass of the others, K being 1 or more, such as top32"
    )


def _unreadable(text: str) -> UserError:
    return UserError(
        f"codec {text!r} cannot be read: give [poolSIDE,][pcaCHANNELS,]TYPE with TYPE one of "
        f"{', '.join(STORED_TYPES)}, such as pool4,pca256,uint8 or fp16"
    )
