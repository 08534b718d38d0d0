"""ReviewKD, knowledge review (Chen et al., arXiv 2104.09044).

    loss = sum over levels of HCL(teacher level, fused student level)

The levels are the stages of both networks and, deepest, their pooled vectors as 1x1 maps. From deep to shallow, each
student map is mapped to MIDDLE channels and fused with the result of the deeper levels (resized by nearest pixels; two
attention maps weight the two). A 3x3 convolution of it is compared with the teacher's map of that level. HCL compares
two maps by the mean squared error, at their own size and average-pooled to 4x4, 2x2 and 1x1 (the sizes that are
smaller), with weights 1, 1/2, 1/4, 1/8 divided by their sum.

Published: at most 512 channels in the middle (and no more than the student's deepest level has), and a weight that
rises over 20 epochs on CIFAR-100 (``loss.rival_warmup``), chosen for each pair of networks: 0.6 to 8 on CIFAR-100, 5
for resnet32x4 -> resnet8x4; 1 on ImageNet, the value here. A difference: the authors read maps before their last ReLU,
and this loss reads them at the configured taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimkd_ray.losses.methods.base import Picked, Rival, RivalTaps

MIDDLE = 512
SIDES = (4, 2, 1)


class ReviewKD(Rival):
    """The ReviewKD loss on maps of all stages and vectors; a fusing block for each level."""

    def __init__(self, taps: RivalTaps) -> None:
        super().__init__(taps)
        levels = [*reversed(taps.vectors), *reversed(taps.maps)]  # deep to shallow
        middle = min(MIDDLE, levels[0].student.channels)
        self.fusions = nn.ModuleList(
            Fusion(pair.student.channels, middle, pair.teacher.channels, fuses=level > 0)
            for level, pair in enumerate(levels)
        )

    def compare(self, teacher: Picked, student: Picked, labels_B: Tensor, ids_B: Tensor) -> Tensor:
        losses: list[Tensor] = []
        review: Tensor | None = None
        for fusion, teacher_BCHW, student_BCHW in zip(self.fusions, _levels(teacher), _levels(student), strict=True):
            made_BCHW, review = fusion(student_BCHW, review, teacher_BCHW.shape[2:])
            losses.append(hierarchical_loss(teacher_BCHW, made_BCHW))
        return sum(losses[1:], losses[0])


def _levels(picked: Picked) -> list[Tensor]:
    """Return the maps (B, C, H, W) of all levels, deep to shallow."""
    vectors = [vector_BC[:, :, None, None] for vector_BC in picked.vectors]
    return [*reversed(vectors), *reversed(picked.maps)]


class Fusion(nn.Module):
    """The fusion of one level of the student with the review of the deeper levels."""

    def __init__(self, student_channels: int, middle: int, teacher_channels: int, fuses: bool) -> None:
        super().__init__()
        first = nn.Conv2d(student_channels, middle, 1, bias=False)
        last = nn.Conv2d(middle, teacher_channels, 3, padding=1, bias=False)
        for convolution in (first, last):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.enter = nn.Sequential(first, nn.BatchNorm2d(middle))
        self.attention = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if fuses else None
        self.leave = nn.Sequential(last, nn.BatchNorm2d(teacher_channels))

    def forward(self, student_BCHW: Tensor, review: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Return the map to compare with the teacher's, (B, teacher channels, *size), and the review for the next
        level, (B, middle, *size)."""
        entered = self.enter(student_BCHW)
        if self.attention is not None:
            assert review is not None, "a level that fuses was given no review"
            review = F.interpolate(review, entered.shape[2:], mode="nearest")
            share = self.attention(torch.cat([entered, review], dim=1))
            entered = entered * share[:, :1] + review * share[:, 1:]
        if entered.shape[2:] != size:
            entered = F.interpolate(entered, size, mode="nearest")
        return self.leave(entered), entered


def hierarchical_loss(teacher_BCHW: Tensor, student_BCHW: Tensor) -> Tensor:
    """Return the HCL of two maps of one shape: a weighted mean of squared errors from fine to coarse."""
    total, weight, weights = F.mse_loss(student_BCHW, teacher_BCHW), 1.0, 1.0
    for side in SIDES:
        if side < teacher_BCHW.shape[2]:
            weight /= 2
            coarse = F.adaptive_avg_pool2d(student_BCHW - teacher_BCHW, (side, side))  # pools both at once
            total = total + weight * coarse.square().mean()
            weights += weight
    return total / weights
