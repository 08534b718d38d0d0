"""AT, attention transfer (Zagoruyko & Komodakis, arXiv 1612.03928).

    loss = sum over pairs of stages of the mean over images and places of (a(student) - a(teacher))^2

The attention a of a map is the mean over channels of its squared values, normalised to unit length over all places; the
larger map is average-pooled to the smaller one first. The benchmark of CRD's authors takes a mean instead of the
paper's norm, with a weight of 1000. The loss has no parameters, and the two networks may have any channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mimkd_ray.losses.features import match_sizes
from mimkd_ray.losses.methods.base import Picked, Rival


class AT(Rival):
    """The AT loss on maps of all stages; no parameters."""

    def compare(self, teacher: Picked, student: Picked, labels_B: Tensor, ids_B: Tensor) -> Tensor:
        losses = []
        for teacher_BCHW, student_BCHW in zip(teacher.maps, student.maps, strict=True):
            teacher_BCHW, student_BCHW = match_sizes(teacher_BCHW, student_BCHW)
            losses.append(F.mse_loss(_attention(student_BCHW), _attention(teacher_BCHW)))
        return sum(losses[1:], losses[0])


def _attention(map_BCHW: Tensor) -> Tensor:
    """Return the attention of maps: (B, C, H, W) -> (B, H * W), rows of unit length."""
    return F.normalize(map_BCHW.square().mean(1).flatten(1), dim=1)
