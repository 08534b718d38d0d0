"""RKD, relational knowledge distillation (Park et al., arXiv 1904.05068).

    loss = DISTANCE * smooth_l1(d_student, d_teacher) + ANGLE * smooth_l1(a_student, a_teacher)

d_ij is the distance of the pooled vectors of images i and j, divided by the mean distance of all pairs; a_ijk is the
cosine of the angle at j between i and k. Both losses are means over all pairs and triples of the batch. Published
values: DISTANCE 25, ANGLE 50.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mimkd_ray.losses.methods.base import Picked, Rival

DISTANCE, ANGLE = 25.0, 50.0
EPS = 1e-12
"""Squared distance below which a distance counts as 0, because its root has no gradient there."""


class RKD(Rival):
    """The RKD loss on vectors of any two widths; no parameters. Time O(B^3 * C), memory O(B^3 + B^2 * C)."""

    def compare(self, teacher: Picked, student: Picked, labels_B: Tensor, ids_B: Tensor) -> Tensor:
        teacher_BC, student_BC = teacher.vectors[0], student.vectors[0]
        distance = F.smooth_l1_loss(_distances(student_BC), _distances(teacher_BC))
        angle = F.smooth_l1_loss(_angles(student_BC), _angles(teacher_BC))
        return DISTANCE * distance + ANGLE * angle


def _differences(vector_BC: Tensor) -> Tensor:
    """Return the differences (B, B, C): at [j, i] the vector from image j to image i."""
    return vector_BC.unsqueeze(0) - vector_BC.unsqueeze(1)


def _distances(vector_BC: Tensor) -> Tensor:
    """Return the distances (B, B), divided by the mean of those that are not 0."""
    squared_BB = _differences(vector_BC).square().sum(2)
    apart_BB = squared_BB > EPS
    distance_BB = torch.where(apart_BB, torch.where(apart_BB, squared_BB, 1.0).sqrt(), 0.0)
    return distance_BB / (distance_BB.sum() / apart_BB.sum().clamp(min=1)).clamp(min=EPS)


def _angles(vector_BC: Tensor) -> Tensor:
    """Return the cosines (B, B, B): at [j, i, k] that of the angle at j between i and k; 0 if i or k is j."""
    unit_BBC = F.normalize(_differences(vector_BC), dim=2)
    return unit_BBC @ unit_BBC.transpose(1, 2)
