"""Codecs: the conversion of a feature to the bytes of a row and back, by pooling, projection and rounding.

    tap (B, C, H, W) or (B, C)  ->  average-pooled to a side  ->  centred and projected on K principal components
    ->  stored as uint8 with a range per channel, or as fp16, bf16 or fp32

The first two steps (`apply`) belong to a run, cached or live: its loss reads pooled components. Cached features differ
from live ones only by the rounding of the last step. Rows are channels last, (h, w, K), the layout in which critics
read maps. Logits are stored whole, or as the largest ones and the mass of the others (top_logits.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mimkd_ray.config.form.codec_spec import CodecSpec, StoredType
from mimkd_ray.errors import UserError
from mimkd_ray.teacher_cache.top_logits import TopLogits

VERSION = 1
"""Version of the format of a row; part of every cache's key."""

DTYPES: dict[StoredType, torch.dtype] = {
    "uint8": torch.uint8,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}


class Shape(NamedTuple):
    """The shape of a feature of one image: a map, or a vector, which has height and width 0."""

    channels: int
    height: int = 0
    width: int = 0

    @property
    def is_map(self) -> bool:
        """True if it has locations."""
        return self.height > 0

    @property
    def locations(self) -> int:
        """Number of places of the map; 1 for a vector."""
        return max(1, self.height * self.width)


@dataclass(frozen=True, eq=False)
class Calibration:
    """The fitted values of a codec, from a sample of the training set (calibration.py). Float32, on any device."""

    mean_C: Tensor | None
    """Mean, subtracted before the projection; None: no projection."""
    components_KC: Tensor | None
    """Components: orthonormal rows, by falling variance."""
    low_K: Tensor | None
    """Value of a stored 0, per channel; None: not uint8."""
    step_K: Tensor | None
    """Difference between two consecutive stored values."""
    retained: float
    """Share of the variance that the components keep; 1 without a projection."""
    rows: int
    """Images on which it was fitted."""


def coded_shape(spec: CodecSpec, shape: Shape) -> Shape:
    """Return the shape of the coded feature, which the loss reads. Raises UserError for the pooling of a vector."""
    channels = min(spec.pca, shape.channels) if spec.pca else shape.channels
    if not shape.is_map:
        if spec.pool:
            raise UserError(f"codec {spec} pools, and a vector of {shape.channels} channels has no locations")
        return Shape(channels)
    side = spec.pool or max(shape.height, shape.width)
    return Shape(channels, min(side, shape.height), min(side, shape.width))


def projects(spec: CodecSpec, shape: Shape) -> bool:
    """Return whether principal components are taken: not if there are no more channels than requested."""
    return 0 < spec.pca < shape.channels


def needs_calibration(spec: CodecSpec, shape: Shape) -> bool:
    """Return whether the codec has values to be fitted."""
    return spec.kind == "uint8" or projects(spec, shape)


def pool(feature: Tensor, shape: Shape) -> Tensor:
    """Average-pool (B, C, H, W) to `shape`'s height and width; return a vector, or a map of that size, unchanged."""
    if not shape.is_map or feature.shape[2:] == (shape.height, shape.width):
        return feature
    return F.adaptive_avg_pool2d(feature, (shape.height, shape.width))


def channels_last(feature: Tensor) -> Tensor:
    """Return (B, C, H, W) as (B, H, W, C), a view; (B, C) unchanged."""
    return feature.permute(0, 2, 3, 1) if feature.dim() == 4 else feature


def row_bytes(spec: CodecSpec, shape: Shape) -> int:
    """Return the bytes of a stored row."""
    if spec.top:
        return TopLogits(spec.top, shape.channels).row_bytes
    coded = coded_shape(spec, shape)
    return coded.channels * coded.locations * DTYPES[spec.kind].itemsize


def make_codec(
    spec: CodecSpec, shape: Shape, calibration: Calibration | None, device: torch.device
) -> Codec | TopLogits:
    """Return the codec of a feature of this shape on the device."""
    return TopLogits(spec.top, shape.channels) if spec.top else Codec(spec, shape, calibration, device)


class Codec:
    """One tap's codec, on one device. `calibration` may be None if `needs_calibration` is False."""

    def __init__(self, spec: CodecSpec, shape: Shape, calibration: Calibration | None, device: torch.device) -> None:
        self.spec, self.shape, self.coded = spec, shape, coded_shape(spec, shape)
        self.kind = spec.kind
        self.row_bytes = row_bytes(spec, shape)
        self._weight_CK = self._bias_K = None
        if calibration is not None and calibration.mean_C is not None and calibration.components_KC is not None:
            mean_C, components_KC = calibration.mean_C.to(device), calibration.components_KC.to(device)
            self._weight_CK = components_KC.T.contiguous()
            # In float64: the bias is a sum of C products, and its error would affect every row.
            self._bias_K = -(components_KC.double() @ mean_C.double()).float()
        self._range: tuple[Tensor, Tensor] | None = None
        if calibration is not None and calibration.low_K is not None and calibration.step_K is not None:
            self._range = calibration.low_K.to(device), calibration.step_K.to(device)

    def apply(self, feature: Tensor) -> Tensor:
        """Pool and project: (B, C, H, W) -> (B, K, h, w), (B, C) -> (B, K). float32 (float64 is kept), autocast off."""
        with torch.autocast(feature.device.type, enabled=False):
            feature = feature if feature.dtype == torch.float64 else feature.float()
            pooled = channels_last(pool(feature, self.coded))
            if self._weight_CK is None or self._bias_K is None:
                return self._as_map(pooled)
            rows_NC = pooled.reshape(-1, self.shape.channels)
            rows_NK = torch.addmm(self._bias_K.to(feature.dtype), rows_NC, self._weight_CK.to(feature.dtype))
            return self._as_map(rows_NK.view(*pooled.shape[:-1], -1))

    def pack(self, coded: Tensor) -> Tensor:
        """Return the rows (B, row_bytes), uint8, of the output of `apply`."""
        values = channels_last(coded)
        if self.kind == "uint8":
            assert self._range is not None, "uint8 without its calibration"
            low_K, step_K = self._range
            return ((values - low_K) / step_K).round_().clamp_(0, 255).to(torch.uint8).flatten(1)
        return values.to(DTYPES[self.kind]).contiguous().flatten(1).view(torch.uint8)

    def decode(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (B, K, h, w), channels last in memory, or (B, K), from rows (B, row_bytes). uint8 takes one fused
        multiply-add."""
        size = (self.coded.height, self.coded.width) if self.coded.is_map else ()
        values = rows.view(DTYPES[self.kind]).view(len(rows), *size, self.coded.channels)
        if self.kind != "uint8":
            return self._as_map(values.to(dtype))
        assert self._range is not None, "uint8 without its calibration"
        low_K, step_K = self._range
        return self._as_map(torch.addcmul(low_K.to(dtype), values, step_K.to(dtype)))

    def _as_map(self, values: Tensor) -> Tensor:
        return values.permute(0, 3, 1, 2) if self.coded.is_map else values
