"""The locations of a map that a term scores in a step.

Neighbouring locations of a map carry similar information, and a critic costs as much at each. A large map is therefore
read on an even grid that moves at every step: over the steps every location counts equally often, so the loss and its
gradient are, in expectation, those over all locations.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Locations(NamedTuple):
    """A grid on a map: the product of its rows and columns."""

    rows_R: Tensor
    columns_S: Tensor


def draw_locations(feature_BCHW: Tensor, limit: int) -> Locations | None:
    """Return an even grid of at most ``limit`` locations of a map, at a position drawn from the random numbers of its
    device; None (all locations) if the map has no more than that or ``limit`` is 0.

    Training seeds these numbers by (seed, step, lane), so a resumed or resized run draws the same grids.
    """
    height, width = feature_BCHW.shape[2:]
    if not limit or height * width <= limit:
        return None
    rows = min(height, limit, max(1, math.isqrt(limit * height // width)))
    columns = min(width, limit // rows)
    phase_2 = torch.rand(2, device=feature_BCHW.device)
    return Locations(even(phase_2[0], rows, height), even(phase_2[1], columns, width))


def even(phase: Tensor, count: int, size: int) -> Tensor:
    """Return ``count`` positions in [0, size), evenly spaced up to rounding. With ``phase`` uniform in [0, 1), each
    position is among them with probability count / size."""
    at = (torch.arange(count, device=phase.device) + phase) * (size / count)
    return at.long().clamp(max=size - 1)  # float32 may round the last position up to size


def to_locations(feature: Tensor, where: Locations | None = None) -> Tensor:
    """Reshape (B, C) -> (1, B, C) and (B, C, H, W) -> (locations, B, C): all locations as views of a channels-last map,
    or those of a grid."""
    if feature.dim() == 2:
        return feature.unsqueeze(0)
    feature_BHWC = feature.permute(0, 2, 3, 1)
    if where is not None:
        feature_BHWC = feature_BHWC.index_select(1, where.rows_R).index_select(2, where.columns_S)
    return feature_BHWC.flatten(1, 2).transpose(0, 1)
