"""Hinton's knowledge distillation (arXiv 1503.02531)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mimkd_ray.losses.features import full_precision


def kd_loss(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """Return T^2 * KL(softmax(teacher / T) || softmax(student / T)), mean over the batch, in float32; a scalar.

    The factor T^2 keeps the gradient's size independent of T. No gradient reaches the teacher.
    """
    with torch.autocast(student_BC.device.type, enabled=False):
        student = F.log_softmax(full_precision(student_BC) / temperature, dim=1)
        teacher = F.log_softmax(full_precision(teacher_BC.detach()) / temperature, dim=1)
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
