"""DKD, decoupled knowledge distillation (Zhao et al., arXiv 2203.08679).

    loss = TCKD + beta * NCKD

With p the student's and q the teacher's softmax at temperature T, and y the label:

* TCKD (target class): T^2 KL of the two-way distributions (q_y, 1 - q_y) || (p_y, 1 - p_y)
* NCKD (other classes): T^2 KL of the softmaxes over all classes but y

Mean over the batch. KD is TCKD + (1 - q_y) NCKD; DKD replaces the factor 1 - q_y by beta. Published: weight 1, and a
beta for each pair of networks (``loss.dkd_beta``), with T 4 and a weight that rises over 20 epochs on CIFAR-100, T 1
and one epoch on ImageNet (``loss.dkd_temperature``, ``loss.rival_warmup``). The recipes have the values of their pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mimkd_ray.losses.methods.base import Picked, Rival, RivalTaps


class DKD(Rival):
    """The DKD loss on logits and labels; no parameters. Holds a few tensors of the logits' size."""

    def __init__(self, taps: RivalTaps, beta: float, temperature: float) -> None:
        super().__init__(taps)
        self.beta, self.temperature = beta, temperature

    def compare(self, teacher: Picked, student: Picked, labels_B: Tensor, ids_B: Tensor) -> Tensor:
        teacher_two, teacher_others = _decouple(teacher.logits_BC / self.temperature, labels_B)
        student_two, student_others = _decouple(student.logits_BC / self.temperature, labels_B)
        target = F.kl_div(student_two, teacher_two, reduction="batchmean", log_target=True)
        others = F.kl_div(student_others, teacher_others, reduction="batchmean", log_target=True)
        return self.temperature**2 * (target + self.beta * others)


def _decouple(logits_BC: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities (B, 2) of the label and of all others together, and (B, C - 1) of each among the
    others."""
    labels_B1 = labels_B.unsqueeze(1)
    classes = torch.arange(logits_BC.shape[1] - 1, device=labels_B.device)
    others_BC = logits_BC.gather(1, classes + (classes >= labels_B1))
    two_B2 = torch.cat([logits_BC.gather(1, labels_B1), others_BC.logsumexp(1, keepdim=True)], dim=1)
    return F.log_softmax(two_B2, dim=1), F.log_softmax(others_BC, dim=1)
