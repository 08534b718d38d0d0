"""Critics: networks that score how well a student feature and a teacher feature belong together.

A critic embeds either side once, ``(..., C) -> (..., d)``, and then scores pairs of embeddings, either each with
its own partner (``paired``) or every student with every teacher of the lane (``all_pairs``). Vectors and every
location of a map go through the same weights; positions are a leading dimension L (1 for vectors, and a teacher
vector broadcasts over the locations of a student map).

Critics use LayerNorm and no batch norm, so a pair scores the same wherever its partner came from. Widths and
layer counts are our choice (the paper's were not to be had): a width of 128 keeps the three terms near 3 % of a
ResNet-18 student's forward arithmetic, and 6 % of its step on a CPU (benchmarks/loss.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimkd_ray.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The network that scores a pair of features."""

    kind: Literal["dot", "concat"] = "dot"
    """dot: scaled cosine of two projections. concat: a small network on the joined features."""
    width: int = 128
    """Units of the hidden layers and of the embeddings."""
    temperature: float = 0.1
    """Starting temperature of the dot critic: score = cosine / temperature + bias."""
    learn_temperature: bool = True
    """Train the temperature (never below min_temperature), or keep it fixed."""
    min_temperature: float = 0.01
    """Lower limit of a learned temperature; without one it runs away."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UserError(f"loss.critic.width is {self.width}; it must be at least 1")
        if not 0 < self.min_temperature <= self.temperature:
            raise UserError(
                f"loss.critic.temperature is {self.temperature} and min_temperature {self.min_temperature}; "
                "0 < min_temperature <= temperature is needed"
            )


class Pointwise(nn.Linear):
    """nn.Linear for features by location, (L, B, in) -> (L, B, out).

    On a CPU it runs as a 1x1 convolution: oneDNN uses all of a processor's vector units, PyTorch's BLAS (MKL) only
    those of Intel's, and is half as fast on others.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or input.dtype != torch.float32 or input.dim() != 3 or 1 in input.shape[:2]:
            return super().forward(input)
        swapped = input.stride(0) < input.stride(1)  # a view of a channels-last map: memory holds images first
        rows_NMC = input.transpose(0, 1) if swapped else input
        weight_OC11 = self.weight[:, :, None, None]
        output_NO1M = F.conv2d(rows_NMC.transpose(1, 2).unsqueeze(2), weight_OC11, self.bias)
        output_NMO = output_NO1M.squeeze(2).transpose(1, 2)
        return output_NMO.transpose(0, 1) if swapped else output_NMO


class Projection(nn.Module):
    """Linear-ReLU-Linear plus a linear shortcut, then LayerNorm: (..., channels) -> (..., width).

    The shortcut starts as an isometry: the identity where the input is not wider than the output, and otherwise a
    random orthogonal projection, which keeps angles on average instead of dropping the channels past ``width``.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.hidden = Pointwise(channels, width)
        self.output = Pointwise(width, width)
        self.shortcut = Pointwise(channels, width, bias=False)
        self.norm = nn.LayerNorm(width)
        if channels <= width:
            nn.init.eye_(self.shortcut.weight)
        else:
            nn.init.orthogonal_(self.shortcut.weight)

    def forward(self, feature: Tensor) -> Tensor:
        return self.norm(self.output(F.relu(self.hidden(feature))) + self.shortcut(feature))


class DotCritic(nn.Module):
    """score = cosine(student, teacher) / temperature + bias."""

    pair_width = 1
    """Values held per scored pair; the loss sizes its chunks by it."""

    def __init__(self, teacher_channels: int, student_channels: int, config: CriticConfig) -> None:
        super().__init__()
        self.teacher = Projection(teacher_channels, config.width)
        self.student = Projection(student_channels, config.width)
        self.max_log_scale = -math.log(config.min_temperature)
        log_scale = torch.tensor(-math.log(config.temperature))
        if config.learn_temperature:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        self.bias = nn.Parameter(torch.zeros(()))

    def scale(self) -> Tensor:
        """1 / temperature."""
        # Not clamp: in recent PyTorch it has no gradient *at* its limit, where constrain_ puts the parameter.
        return torch.where(self.log_scale > self.max_log_scale, self.max_log_scale, self.log_scale).exp()

    @torch.no_grad()
    def constrain_(self) -> None:
        """Bring a learned temperature back to its limit. Call after an optimiser step: a clamp in the forward pass
        alone would leave a parameter beyond the limit without a gradient for ever."""
        self.log_scale.clamp_(max=self.max_log_scale)

    def embed_teacher(self, feature: Tensor) -> Tensor:
        """(..., teacher channels) -> (..., width), of unit length."""
        return F.normalize(self.teacher(feature), dim=-1)

    def embed_student(self, feature: Tensor) -> Tensor:
        """(..., student channels) -> (..., width), of unit length."""
        return F.normalize(self.student(feature), dim=-1)

    def paired(self, student_LBd: Tensor, teacher_LBd: Tensor) -> Tensor:
        """Score each student with the teacher in the same place: (L, B)."""
        return (student_LBd * teacher_LBd).sum(-1) * self.scale() + self.bias

    def all_pairs(self, student_LBd: Tensor, teacher_LBd: Tensor) -> Tensor:
        """Score each student (rows) with every teacher (columns) at the same location: (L, B, K)."""
        return student_LBd @ teacher_LBd.transpose(1, 2) * self.scale() + self.bias


class ConcatCritic(nn.Module):
    """score = MLP([student, teacher]) with two hidden layers. The first layer of the joined input is a sum of one
    linear map a side, so each side is embedded once whatever the number of pairs."""

    def __init__(self, teacher_channels: int, student_channels: int, config: CriticConfig) -> None:
        super().__init__()
        self.pair_width = config.width
        self.teacher = nn.Sequential(nn.LayerNorm(teacher_channels), Pointwise(teacher_channels, config.width))
        self.student = nn.Sequential(
            nn.LayerNorm(student_channels), Pointwise(student_channels, config.width, bias=False)
        )
        self.hidden = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, 1)

    @property
    def bias(self) -> Tensor:
        return self.output.bias[0]

    def scale(self) -> Tensor:
        """The concat critic has no temperature: 1."""
        return torch.ones((), device=self.output.weight.device)

    def constrain_(self) -> None:
        """Nothing is bounded in this critic."""

    def embed_teacher(self, feature: Tensor) -> Tensor:
        """(..., teacher channels) -> (..., width): the teacher's share of the first layer."""
        return self.teacher(feature)

    def embed_student(self, feature: Tensor) -> Tensor:
        """(..., student channels) -> (..., width): the student's share of the first layer."""
        return self.student(feature)

    def _score(self, first: Tensor) -> Tensor:
        return self.output(F.relu(self.hidden(F.relu(first)))).squeeze(-1)

    def paired(self, student_LBd: Tensor, teacher_LBd: Tensor) -> Tensor:
        """Score each student with the teacher in the same place: (L, B)."""
        return self._score(student_LBd + teacher_LBd)

    def all_pairs(self, student_LBd: Tensor, teacher_LBd: Tensor) -> Tensor:
        """Score each student (rows) with every teacher (columns): (L, B, K). Holds L*B*K*width values."""
        return self._score(student_LBd.unsqueeze(2) + teacher_LBd.unsqueeze(1))


Critic = DotCritic | ConcatCritic


def build_critic(config: CriticConfig, teacher_channels: int, student_channels: int) -> Critic:
    """Build the critic of one pair of taps with these channel counts."""
    kind = DotCritic if config.kind == "dot" else ConcatCritic
    return kind(teacher_channels, student_channels, config)
