"""The features of a network that losses read, and their conversion to one precision and size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def full_precision(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32; float64 is kept, so that runs can be compared in double precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class Others(NamedTuple):
    """Teacher vectors (M, C) by tap, ids and class numbers (negative: unknown) of images beside the lane's: additional
    negatives for terms of vectors."""

    vectors: Mapping[str, Tensor]
    ids_M: Tensor
    labels_M: Tensor


class Features(NamedTuple):
    """Outputs of a network for a lane: logits (B, classes), vectors (B, C) and maps (B, C, H, W) by tap."""

    logits_BC: Tensor
    vectors: Mapping[str, Tensor]
    maps: Mapping[str, Tensor]
    others: Others | None = None


def in_full_precision(features: Features) -> Features:
    """Cast every feature once, so that the gradients of the terms that read it are summed in float32 and rounded to the
    feature's own precision once."""
    return Features(
        full_precision(features.logits_BC),
        {tap: full_precision(value) for tap, value in features.vectors.items()},
        {tap: full_precision(value) for tap, value in features.maps.items()},
    )


def match_sizes(teacher_BCHW: Tensor, student_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two maps to the smaller one's height and width."""
    height = min(teacher_BCHW.shape[2], student_BCHW.shape[2])
    width = min(teacher_BCHW.shape[3], student_BCHW.shape[3])

    def pool(feature: Tensor) -> Tensor:
        return feature if feature.shape[2:] == (height, width) else F.adaptive_avg_pool2d(feature, (height, width))

    return pool(teacher_BCHW), pool(student_BCHW)
