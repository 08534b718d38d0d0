"""FitNet's hints (Romero et al., arXiv 1412.6550), trained together with the cross-entropy.

    loss = mean over images, channels and places of (teacher map - regressor(student map))^2

The regressor is a convolution, batch norm and ReLU, as in the benchmark of CRD's authors, whose weight is 100. It maps
the student's channels to the teacher's, and its size as well: a student map of twice the side has a 3x3 convolution of
stride 2, one of half the side a transposed 4x4 convolution, any other larger one a kernel as large as the difference
plus 1. A smaller one (which the benchmark does not have) is first resized to the teacher's size by nearest pixels. The
paper trains hints in a separate stage before the cross-entropy; the benchmark and this loss do not.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mimkd_ray.losses.methods.base import Picked, Rival, RivalTaps, Side


class FitNet(Rival):
    """The FitNet loss on maps; a regressor for each pair."""

    def __init__(self, taps: RivalTaps) -> None:
        super().__init__(taps)
        self.regressors = nn.ModuleList(Regressor(pair.student, pair.teacher) for pair in taps.maps)

    def compare(self, teacher: Picked, student: Picked, labels_B: Tensor, ids_B: Tensor) -> Tensor:
        losses = [
            F.mse_loss(regressor(student_BCHW), teacher_BCHW)
            for regressor, teacher_BCHW, student_BCHW in zip(self.regressors, teacher.maps, student.maps, strict=True)
        ]
        return sum(losses[1:], losses[0])


class Regressor(nn.Module):
    """A map from student to teacher features: (B, student channels, h, w) -> (B, teacher channels, H, W), not
    negative."""

    def __init__(self, student: Side, teacher: Side) -> None:
        super().__init__()
        self.size = (teacher.height, teacher.width)
        higher, wider = student.height - teacher.height, student.width - teacher.width
        self.grows = False
        self.convolution: nn.Module
        if (student.height, student.width) == (2 * teacher.height, 2 * teacher.width):
            self.convolution = nn.Conv2d(student.channels, teacher.channels, 3, stride=2, padding=1)
        elif (2 * student.height, 2 * student.width) == (teacher.height, teacher.width):
            self.convolution = nn.ConvTranspose2d(student.channels, teacher.channels, 4, stride=2, padding=1)
        elif higher >= 0 and wider >= 0:
            self.convolution = nn.Conv2d(student.channels, teacher.channels, (1 + higher, 1 + wider))
        else:
            self.grows = True
            self.convolution = nn.Conv2d(student.channels, teacher.channels, 1)
        self.norm = nn.BatchNorm2d(teacher.channels)

    def forward(self, student_BCHW: Tensor) -> Tensor:
        if self.grows:
            student_BCHW = F.interpolate(student_BCHW, self.size, mode="nearest")
        return F.relu(self.norm(self.convolution(student_BCHW)))
