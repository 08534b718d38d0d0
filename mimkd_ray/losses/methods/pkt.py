"""PKT, probabilistic knowledge transfer (Passalis & Tefas, ECCV 2018, arXiv 1803.10837).

    loss = mean over i, j of q_ij * log(q_ij / p_ij)

p_ij is the probability that image j is a neighbour of image i by the student's pooled vectors, q_ij by the teacher's:
cosine similarities, mapped to (cosine + 1) / 2 and normalised to sum 1 over j. The benchmark's weight of 30,000 applies
to the mean over all B^2 pairs, not to the sum.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mimkd_ray.losses.methods.base import Picked, Rival

EPS = 1e-7
"""Constant added to both probabilities, because opposite vectors have probability 0."""


class PKT(Rival):
    """The PKT loss on vectors of any two widths; no parameters. Holds B*B values."""

    def compare(self, teacher: Picked, student: Picked, labels_B: Tensor, ids_B: Tensor) -> Tensor:
        teacher_BB, student_BB = _neighbours(teacher.vectors[0]), _neighbours(student.vectors[0])
        return (teacher_BB * ((teacher_BB + EPS).log() - (student_BB + EPS).log())).mean()


def _neighbours(vector_BC: Tensor) -> Tensor:
    """Return the neighbour probabilities (B, B): row i is a distribution over the images."""
    unit_BC = F.normalize(vector_BC, dim=1, eps=EPS)
    similarity_BB = (unit_BC @ unit_BC.T + 1) / 2
    return similarity_BB / similarity_BB.sum(1, keepdim=True)
