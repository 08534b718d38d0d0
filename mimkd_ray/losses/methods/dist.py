"""DIST, knowledge distillation from a stronger teacher (Huang et al., arXiv 2205.10536).

    loss = T^2 (BETA * (1 - mean over images of r(p_i, q_i)) + GAMMA * (1 - mean over classes of r(p^c, q^c)))

r is Pearson's correlation, p and q are the softmaxes at temperature T of student and teacher: row p_i is an image's
distribution over the classes ("inter-class"), column p^c a class's probabilities over the images of the batch
("intra-class"). The loss therefore asks for a linear relation instead of equal numbers. Published values: BETA and
GAMMA 2 beside a cross-entropy of weight 1; T 4 on CIFAR-100 and 1 on ImageNet (``loss.dist_temperature``).
"""

from __future__ import annotations

from torch import Tensor

from mimkd_ray.losses.methods.base import Picked, Rival, RivalTaps

BETA, GAMMA = 2.0, 2.0
EPS = 1e-8
"""Constant added to the denominator of a correlation, so that a constant row or column counts as uncorrelated."""


class DIST(Rival):
    """The DIST loss on logits; no parameters."""

    def __init__(self, taps: RivalTaps, temperature: float) -> None:
        super().__init__(taps)
        self.temperature = temperature

    def compare(self, teacher: Picked, student: Picked, labels_B: Tensor, ids_B: Tensor) -> Tensor:
        student_BC = (student.logits_BC / self.temperature).softmax(1)
        teacher_BC = (teacher.logits_BC / self.temperature).softmax(1)
        inter = 1 - _pearson(student_BC, teacher_BC).mean()
        intra = 1 - _pearson(student_BC.T, teacher_BC.T).mean()
        return self.temperature**2 * (BETA * inter + GAMMA * intra)


def _pearson(a_NM: Tensor, b_NM: Tensor) -> Tensor:
    """Return the correlation of each row of one with the same row of the other: (N,)."""
    a_NM = a_NM - a_NM.mean(1, keepdim=True)
    b_NM = b_NM - b_NM.mean(1, keepdim=True)
    return (a_NM * b_NM).sum(1) / (a_NM.norm(dim=1) * b_NM.norm(dim=1) + EPS)
