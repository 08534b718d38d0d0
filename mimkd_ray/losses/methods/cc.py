"""CC, correlation congruence (Peng et al., arXiv 1904.01802).

    loss = 1 / B^2 * || K(teacher) - K(student) ||^2

K is the Gaussian kernel exp(-GAMMA * ||x_i - x_j||^2) of the pooled vectors at unit length, in its Taylor expansion of
order 2 at x_i . x_j = 0:

    K_ij = e^(-2 GAMMA) * (1 + 2 GAMMA x_i.x_j + (2 GAMMA x_i.x_j)^2 / 2)

Published values: GAMMA 0.4, order 2. The weight, 100, is that of widely used re-implementations of this formula. The
benchmark of CRD's authors has a weight of 0.02 for another formula under the same name (products of neighbouring
differences of trained embeddings), so its results for CC do not apply to this loss.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from mimkd_ray.losses.methods.base import Picked, Rival

GAMMA = 0.4
ORDER = 2


class CC(Rival):
    """The CC loss on vectors of any two widths; no parameters. Holds B*B values."""

    def compare(self, teacher: Picked, student: Picked, labels_B: Tensor, ids_B: Tensor) -> Tensor:
        return F.mse_loss(_kernel(student.vectors[0]), _kernel(teacher.vectors[0]))


def _kernel(vector_BC: Tensor) -> Tensor:
    unit_BC = F.normalize(vector_BC, dim=1)
    cosine_BB = unit_BC @ unit_BC.T
    powers = [(2 * GAMMA * cosine_BB) ** order / math.factorial(order) for order in range(ORDER + 1)]
    return math.exp(-2 * GAMMA) * sum(powers[1:], powers[0])
