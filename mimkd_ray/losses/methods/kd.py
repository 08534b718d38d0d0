"""Hinton's knowledge distillation (arXiv 1503.02531), on logits as they are or standardised (arXiv 2403.01427)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mimkd_ray.losses.features import full_precision


def kd_loss(student_BC: Tensor, teacher_BC: Tensor, temperature: float, standardise: bool = False) -> Tensor:
    """Return T^2 * KL(softmax(teacher / T) || softmax(student / T)), mean over the batch, in float32; a scalar.

    The factor T^2 keeps the gradient's size independent of T. ``standardise``: first bring the logits of each image, of
    both networks, to mean 0 and standard deviation 1 over the classes, so that the student need not match the size of
    the teacher's logits (Sun et al., "Logit Standardization in Knowledge Distillation", arXiv 2403.01427). No gradient
    reaches the teacher.
    """
    with torch.autocast(student_BC.device.type, enabled=False):
        both = full_precision(student_BC), full_precision(teacher_BC.detach())
        if standardise:  # as a layer norm: where an image's logits are equal, its gradient is finite
            both = F.layer_norm(both[0], both[0].shape[1:]), F.layer_norm(both[1], both[1].shape[1:])
        student, teacher = (F.log_softmax(logits_BC / temperature, dim=1) for logits_BC in both)
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
