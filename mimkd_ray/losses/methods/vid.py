"""VID, variational information distillation (Ahn et al., arXiv 1904.05835).

    loss = sum over pairs of stages of the mean of 1/2 ((teacher - mu(student))^2 / variance + ln variance)

This is the negative log-likelihood of a Gaussian that predicts the teacher's map from the student's, without its
constant: a bound on their mutual information. Its mean mu is a network of three 1x1 convolutions; its variance is one
number a channel, softplus(alpha) + MIN_VARIANCE, initially 5. The larger map is average-pooled to the smaller one.
Weight 1, as in the benchmark of CRD's authors, whose networks are as wide as the teacher's map.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimkd_ray.losses.features import match_sizes
from mimkd_ray.losses.methods.base import Picked, Rival, RivalTaps

START_VARIANCE, MIN_VARIANCE = 5.0, 1e-5


class VID(Rival):
    """The VID loss on maps of all stages; a network and a variance for each pair."""

    def __init__(self, taps: RivalTaps) -> None:
        super().__init__(taps)
        self.gaussians = nn.ModuleList(Gaussian(pair.student.channels, pair.teacher.channels) for pair in taps.maps)

    def compare(self, teacher: Picked, student: Picked, labels_B: Tensor, ids_B: Tensor) -> Tensor:
        losses = []
        for gaussian, teacher_BCHW, student_BCHW in zip(self.gaussians, teacher.maps, student.maps, strict=True):
            teacher_BCHW, student_BCHW = match_sizes(teacher_BCHW, student_BCHW)
            losses.append(gaussian(teacher_BCHW, student_BCHW))
        return sum(losses[1:], losses[0])


class Gaussian(nn.Module):
    """The mean negative log-likelihood of a teacher map (B, C_teacher, H, W), given the student's (B, C_student, H,
    W)."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
        )
        # softplus(alpha) + MIN_VARIANCE is START_VARIANCE
        self.alpha = nn.Parameter(torch.full((teacher_channels,), math.log(math.expm1(START_VARIANCE - MIN_VARIANCE))))

    def forward(self, teacher_BCHW: Tensor, student_BCHW: Tensor) -> Tensor:
        variance_C11 = (F.softplus(self.alpha) + MIN_VARIANCE).view(-1, 1, 1)
        error_BCHW = (teacher_BCHW - self.mean(student_BCHW)).square()
        return 0.5 * (error_BCHW / variance_C11 + variance_C11.log()).mean()
