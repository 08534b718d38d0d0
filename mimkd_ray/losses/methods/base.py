"""The base class of all rivals: it selects the features that they read, computes in float32, and stops the teacher's
gradient."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mimkd_ray.losses.features import Features, full_precision


class Side(NamedTuple):
    """A tap of one network and the shape of its feature; a vector has height and width 1."""

    tap: str
    channels: int
    height: int = 1
    width: int = 1


class TapPair(NamedTuple):
    """A tap of the teacher and one of the student."""

    teacher: Side
    student: Side


class RivalTaps(NamedTuple):
    """The taps that a rival reads: at most one pair of vectors, and pairs of maps from shallow to deep."""

    vectors: tuple[TapPair, ...] = ()
    maps: tuple[TapPair, ...] = ()


class Picked(NamedTuple):
    """Features of one network that a rival reads, in float32 (float64 is kept), in the order of its taps."""

    logits_BC: Tensor
    vectors: tuple[Tensor, ...]
    maps: tuple[Tensor, ...]


class Rival(nn.Module):
    """A distillation loss. Its connectors and embeddings are trained with the student and never exported.

    ``forward(teacher, student, labels_B, ids_B)`` returns a scalar without its weight. It turns autocast off, and no
    gradient reaches the teacher. ``labels_B`` are class numbers; rivals that do not read labels accept mixed labels as
    well.
    """

    def __init__(self, taps: RivalTaps) -> None:
        super().__init__()
        self.taps = taps

    def forward(self, teacher: Features, student: Features, labels_B: Tensor, ids_B: Tensor) -> Tensor:
        with torch.autocast(labels_B.device.type, enabled=False):
            of_teacher, of_student = _pick(teacher, self.taps, "teacher"), _pick(student, self.taps, "student")
            return self.compare(of_teacher, of_student, labels_B, ids_B)

    def compare(self, teacher: Picked, student: Picked, labels_B: Tensor, ids_B: Tensor) -> Tensor:
        """Return the method's own loss, a scalar."""
        raise NotImplementedError


def _pick(features: Features, taps: RivalTaps, who: Literal["teacher", "student"]) -> Picked:
    """Return the features of one network that a rival with these taps reads; those of a teacher have no gradient."""

    def read(value: Tensor) -> Tensor:
        return full_precision(value.detach() if who == "teacher" else value)

    return Picked(
        read(features.logits_BC),
        tuple(read(features.vectors[getattr(pair, who).tap]) for pair in taps.vectors),
        tuple(read(features.maps[getattr(pair, who).tap]) for pair in taps.maps),
    )
