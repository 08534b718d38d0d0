"""Critics: networks that score how well a student feature and a teacher feature belong together.

A critic embeds each side once, ``(L, B, C) -> (L, B, d)``, and then scores pairs of embeddings, either each with its
own partner (``paired``) or every student with every teacher (``all_pairs``). Vectors and every location of a map use
the same weights; locations are a leading dimension L (1 for vectors; a teacher vector is broadcast over the locations
of a student map). critic_sides.py describes the layers of the two sides.

Critics use no statistics of their batch, so the score of a pair does not depend on the other pairs. Widths and layer
counts are our choice (those of the paper were not available).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimkd_ray.config import CriticConfig
from mimkd_ray.losses.critic_sides import Centred, FrozenSide, Pointwise, Projection, Standardised, cosines, unit


class DotCritic(nn.Module):
    """A critic with score = cosine(student, teacher) / temperature + bias."""

    pair_width = 1
    """Values held per scored pair, from which the loss computes the size of its chunks."""

    def __init__(self, teacher_channels: int, student_channels: int, config: CriticConfig) -> None:
        """Build both sides. Unset fields of ``config`` take the values of the preset `paper`: two layers on both sides,
        a learned temperature."""
        super().__init__()
        self.teacher: nn.Module
        if config.teacher == "frozen":
            self.teacher = FrozenSide(teacher_channels, config.frozen_width)
            width = self.teacher.width
        elif config.teacher == "linear":
            self.teacher, width = Pointwise(teacher_channels, config.width), config.width
        else:
            self.teacher, width = Projection(teacher_channels, config.width), config.width
        if config.student == "linear":
            self.student: nn.Module = Pointwise(student_channels, width)
        else:
            self.student = Projection(student_channels, width, config.width)
        self.max_log_scale = -math.log(config.min_temperature)
        log_scale = torch.tensor(-math.log(config.temperature))
        if config.learn_temperature is not False:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        self.bias = nn.Parameter(torch.zeros(()))

    def scale(self) -> Tensor:
        """Return 1 / temperature."""
        # Not clamp: in recent PyTorch it has no gradient *at* its limit, which is the value that constrain_ sets.
        return torch.where(self.log_scale > self.max_log_scale, self.max_log_scale, self.log_scale).exp()

    @torch.no_grad()
    def constrain_(self) -> None:
        """Clamp a learned temperature to its limit. Call this after each optimiser step: with only the limit in the
        forward pass, a parameter beyond it would never get a gradient again."""
        self.log_scale.clamp_(max=self.max_log_scale)

    def reduce_teacher(self, feature: Tensor) -> Tensor:
        """Apply the part of the embedding that never changes: (..., teacher channels) -> (..., reduced channels)."""
        return self.teacher.reduce(feature) if isinstance(self.teacher, FrozenSide) else feature

    def embed_teacher(self, reduced_LKC: Tensor, lane: int | None = None) -> Tensor:
        """Embed teacher features: (L, K, reduced channels) -> (L, K, width), of unit length. The first ``lane``
        features of each location belong to the lane itself; by default all."""
        if isinstance(self.teacher, FrozenSide):
            return unit(self.teacher(reduced_LKC, lane or reduced_LKC.shape[1]))
        return unit(self.teacher(reduced_LKC))

    def embed_student(self, feature: Tensor) -> Tensor:
        """Embed student features: (..., student channels) -> (..., width), of unit length."""
        return unit(self.student(feature))

    def paired(self, student_LBd: Tensor, teacher_LBd: Tensor) -> Tensor:
        """Score each student with the teacher in the same place: (L, B)."""
        return (student_LBd * teacher_LBd).sum(-1) * self.scale() + self.bias

    def all_pairs(self, student_LBd: Tensor, teacher_LKd: Tensor, queue: Centred | None = None) -> Tensor:
        """Score each student (rows) with every teacher (columns) at the same location, and behind them with every
        vector of a queue: (L, B, K) or (L, B, K + M)."""
        return cosines(student_LBd, teacher_LKd, queue) * self.scale() + self.bias


class ConcatCritic(nn.Module):
    """A critic with score = MLP([student, teacher]), two hidden layers, on features standardised by running statistics.

    Standardisation makes features of any scale trainable and keeps the size and mean of a feature relative to others,
    which LayerNorm would remove. The first layer on the joined input is a sum of one linear map per side, so each side
    is embedded once, whatever the number of pairs.
    """

    def __init__(self, teacher_channels: int, student_channels: int, config: CriticConfig) -> None:
        super().__init__()
        self.pair_width = config.width
        self.standard = nn.ModuleList([Standardised(teacher_channels), Standardised(student_channels)])
        self.teacher = Pointwise(teacher_channels, config.width)
        self.student = Pointwise(student_channels, config.width, bias=False)
        self.hidden = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, 1)

    def observe(self, teacher_LBC: Tensor, student_LBC: Tensor) -> None:
        """Update the sums of the running statistics with a lane that is trained on."""
        for standard, feature in zip(self.standard, (teacher_LBC, student_LBC), strict=True):
            standard.observe(feature)  # type: ignore[operator]

    @property
    def bias(self) -> Tensor:
        return self.output.bias[0]

    def scale(self) -> Tensor:
        """Return 1: the concat critic has no temperature."""
        return torch.ones((), device=self.output.weight.device)

    def constrain_(self) -> None:
        """Do nothing: this critic has no bounded parameter."""

    def reduce_teacher(self, feature: Tensor) -> Tensor:
        """Return the feature unchanged: no part of the embedding is fixed."""
        return feature

    def embed_teacher(self, reduced_LKC: Tensor, lane: int | None = None) -> Tensor:
        """Return the teacher's share of the first layer: (L, K, teacher channels) -> (L, K, width). The first ``lane``
        features of each location belong to the lane itself; by default all."""
        return self.teacher(self.standard[0](reduced_LKC, lane))

    def embed_student(self, feature: Tensor) -> Tensor:
        """Return the student's share of the first layer: (..., student channels) -> (..., width)."""
        return self.student(self.standard[1](feature))

    def _score(self, first: Tensor) -> Tensor:
        return self.output(F.relu(self.hidden(F.relu(first)))).squeeze(-1)

    def paired(self, student_LBd: Tensor, teacher_LBd: Tensor) -> Tensor:
        """Score each student with the teacher in the same place: (L, B)."""
        return self._score(student_LBd + teacher_LBd)

    def all_pairs(self, student_LBd: Tensor, teacher_LKd: Tensor, queue: None = None) -> Tensor:
        """Score each student (rows) with every teacher (columns): (L, B, K). Holds L*B*K*width values."""
        return self._score(student_LBd.unsqueeze(2) + teacher_LKd.unsqueeze(1))


Critic = DotCritic | ConcatCritic


def build_critic(config: CriticConfig, teacher_channels: int, student_channels: int) -> Critic:
    """Build the critic of one pair of taps with these channel counts."""
    kind = DotCritic if config.kind == "dot" else ConcatCritic
    return kind(teacher_channels, student_channels, config)
