"""SP, similarity-preserving distillation (Tung & Mori, arXiv 1907.09682).

    loss = 1 / B^2 * || G(teacher) - G(student) ||^2

G is the matrix of inner products of the images' flattened maps, each row normalised to unit length. It is computed at
the deepest stage, with a weight of 3000, as in the paper and the benchmark of CRD's authors.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mimkd_ray.losses.methods.base import Picked, Rival


class SP(Rival):
    """The SP loss on maps of any two shapes; no parameters. Holds B*B values a pair."""

    def compare(self, teacher: Picked, student: Picked, labels_B: Tensor, ids_B: Tensor) -> Tensor:
        losses = [
            F.mse_loss(_similarity(student_BCHW), _similarity(teacher_BCHW))
            for teacher_BCHW, student_BCHW in zip(teacher.maps, student.maps, strict=True)
        ]
        return sum(losses[1:], losses[0])


def _similarity(map_BCHW: Tensor) -> Tensor:
    """Return the normalised inner products: (B, C, H, W) -> (B, B)."""
    flat_BD = map_BCHW.flatten(1)
    return F.normalize(flat_BD @ flat_BD.T, dim=1)
