"""Critics: networks that score how well a student feature and a teacher feature belong together.

A critic embeds either side once, ``(L, B, C) -> (L, B, d)``, and then scores pairs of embeddings, either each with
its own partner (``paired``) or every student with every teacher (``all_pairs``). Vectors and every location of a map go
through the same weights; locations are a leading dimension L (1 for vectors, and a teacher vector broadcasts over the
locations of a student map). What the two sides may learn is told in critic_sides.py.

Critics use no statistics of their batch, so a pair scores the same wherever its partner came from. Widths and layer
counts are our choice (the paper's were not to be had).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimkd_ray.config import CriticConfig
from mimkd_ray.losses.critic_sides import Centred, FrozenSide, Pointwise, Projection, Standardised


class DotCritic(nn.Module):
    """score = cosine(student, teacher) / temperature + bias."""

    pair_width = 1
    """Values held per scored pair; the loss sizes its chunks by it."""

    def __init__(self, teacher_channels: int, student_channels: int, config: CriticConfig) -> None:
        """What ``config`` leaves unset is as in the paper's preset: two layers on both sides, a learned temperature."""
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
        """1 / temperature."""
        # Not clamp: in recent PyTorch it has no gradient *at* its limit, where constrain_ puts the parameter.
        return torch.where(self.log_scale > self.max_log_scale, self.max_log_scale, self.log_scale).exp()

    @torch.no_grad()
    def constrain_(self) -> None:
        """Bring a learned temperature back to its limit. Call after an optimiser step: a clamp in the forward pass
        alone would leave a parameter beyond the limit without a gradient for ever."""
        self.log_scale.clamp_(max=self.max_log_scale)

    def reduce_teacher(self, feature: Tensor) -> Tensor:
        """(..., teacher channels) -> (..., reduced channels): the part of the embedding that never changes."""
        return self.teacher.reduce(feature) if isinstance(self.teacher, FrozenSide) else feature

    def embed_teacher(self, reduced_LKC: Tensor, lane: int | None = None) -> Tensor:
        """(L, K, reduced channels) -> (L, K, width), of unit length. The first ``lane`` of each location are the lane's
        own; by default all."""
        if isinstance(self.teacher, FrozenSide):
            return F.normalize(self.teacher(reduced_LKC, lane or reduced_LKC.shape[1]), dim=-1)
        return F.normalize(self.teacher(reduced_LKC), dim=-1)

    def embed_student(self, feature: Tensor) -> Tensor:
        """(..., student channels) -> (..., width), of unit length."""
        return F.normalize(self.student(feature), dim=-1)

    def paired(self, student_LBd: Tensor, teacher_LBd: Tensor) -> Tensor:
        """Score each student with the teacher in the same place: (L, B)."""
        return (student_LBd * teacher_LBd).sum(-1) * self.scale() + self.bias

    def all_pairs(self, student_LBd: Tensor, teacher_LKd: Tensor) -> Tensor:
        """Score each student (rows) with every teacher (columns) at the same location: (L, B, K)."""
        return student_LBd @ teacher_LKd.transpose(1, 2) * self.scale() + self.bias

    def embed_queue(self, reduced_MC: Tensor) -> Centred | Tensor:
        """Teacher vectors of earlier steps, for :meth:`queue_pairs`."""
        if isinstance(self.teacher, FrozenSide):
            return self.teacher.centred(reduced_MC)
        return self.embed_teacher(reduced_MC.unsqueeze(0))

    def queue_cosines(self, unit_LBd: Tensor, queue: Centred | Tensor) -> Tensor:
        """Cosines of embeddings with every vector of the queue: (L, B, M)."""
        return queue.cosines(unit_LBd) if isinstance(queue, Centred) else unit_LBd @ queue.transpose(1, 2)

    def queue_pairs(self, student_LBd: Tensor, queue: Centred | Tensor) -> Tensor:
        """Score each student with every vector of the queue: (L, B, M)."""
        return self.queue_cosines(student_LBd, queue) * self.scale() + self.bias


class ConcatCritic(nn.Module):
    """score = MLP([student, teacher]) with two hidden layers, on features that are standardised by their running
    statistics: whatever their scale they train, and one against another keeps its size and mean, which LayerNorm takes
    away. The first layer of the joined input is a sum of one linear map a side, so each side is embedded once whatever
    the number of pairs."""

    def __init__(self, teacher_channels: int, student_channels: int, config: CriticConfig) -> None:
        super().__init__()
        self.pair_width = config.width
        self.standard = nn.ModuleList([Standardised(teacher_channels), Standardised(student_channels)])
        self.teacher = Pointwise(teacher_channels, config.width)
        self.student = Pointwise(student_channels, config.width, bias=False)
        self.hidden = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, 1)

    def observe(self, teacher_LBC: Tensor, student_LBC: Tensor) -> None:
        """Take note of a lane that is trained on, for the running statistics."""
        for standard, feature in zip(self.standard, (teacher_LBC, student_LBC), strict=True):
            standard.observe(feature)  # type: ignore[operator]

    @property
    def bias(self) -> Tensor:
        return self.output.bias[0]

    def scale(self) -> Tensor:
        """The concat critic has no temperature: 1."""
        return torch.ones((), device=self.output.weight.device)

    def constrain_(self) -> None:
        """Nothing is bounded in this critic."""

    def reduce_teacher(self, feature: Tensor) -> Tensor:
        """No part of the embedding is fixed: the feature itself."""
        return feature

    def embed_teacher(self, reduced_LKC: Tensor, lane: int | None = None) -> Tensor:
        """(L, K, teacher channels) -> (L, K, width): the teacher's share of the first layer. The first ``lane`` of each
        location are the lane's own; by default all."""
        return self.teacher(self.standard[0](reduced_LKC, lane))

    def embed_student(self, feature: Tensor) -> Tensor:
        """(..., student channels) -> (..., width): the student's share of the first layer."""
        return self.student(self.standard[1](feature))

    def _score(self, first: Tensor) -> Tensor:
        return self.output(F.relu(self.hidden(F.relu(first)))).squeeze(-1)

    def paired(self, student_LBd: Tensor, teacher_LBd: Tensor) -> Tensor:
        """Score each student with the teacher in the same place: (L, B)."""
        return self._score(student_LBd + teacher_LBd)

    def all_pairs(self, student_LBd: Tensor, teacher_LBd: Tensor) -> Tensor:
        """Score each student (rows) with every teacher (columns): (L, B, K). Holds L*B*K*width values."""
        return self._score(student_LBd.unsqueeze(2) + teacher_LBd.unsqueeze(1))

    def embed_queue(self, reduced_MC: Tensor) -> Tensor:
        """Teacher vectors of earlier steps, for :meth:`queue_pairs`."""
        return self.embed_teacher(reduced_MC.unsqueeze(0))

    def queue_cosines(self, unit_LBd: Tensor, queue: Tensor) -> Tensor:
        """Embeddings of this critic have no cosines."""
        raise NotImplementedError("loss.critic.kind concat has no cosines")

    def queue_pairs(self, student_LBd: Tensor, queue: Tensor) -> Tensor:
        """Score each student with every vector of the queue: (L, B, M)."""
        return self.all_pairs(student_LBd, queue)


Critic = DotCritic | ConcatCritic


def build_critic(config: CriticConfig, teacher_channels: int, student_channels: int) -> Critic:
    """Build the critic of one pair of taps with these channel counts."""
    kind = DotCritic if config.kind == "dot" else ConcatCritic
    return kind(teacher_channels, student_channels, config)
