"""Optimiser, weight-decay groups and learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from mimkd_ray.errors import UserError
from mimkd_ray.losses.critics import DotCritic


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser of student and critics and its schedule."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd (momentum) or adamw."""
    lr: float = 0.05
    """Peak learning rate, for the whole global batch."""
    momentum: float = 0.9
    """Momentum of sgd."""
    nesterov: bool = False
    """Nesterov momentum for sgd."""
    weight_decay: float = 5e-4
    """Weight decay of what `decay` says."""
    decay: Literal["weights", "all"] = "weights"
    """weights: norms and biases do not decay. all: every parameter decays, as in the field's CIFAR protocol. Critic
    temperatures never do."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """step: times gamma at each milestone. cosine: falls to min_lr, which the last step has."""
    milestones: tuple[int, ...] = (150, 180, 210)
    """Epochs at which the step schedule drops."""
    gamma: float = 0.1
    """Factor of each drop."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0."""
    min_lr: float = 0.0
    """Last learning rate of the cosine schedule."""
    clip_norm: float = 0.0
    """Clip the gradient's global L2 norm to this; 0 does not clip."""

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.weight_decay < 0 or self.warmup_epochs < 0 or self.clip_norm < 0:
            raise UserError(
                f"optim.lr {self.lr} must be positive; weight_decay {self.weight_decay}, "
                f"warmup_epochs {self.warmup_epochs} and clip_norm {self.clip_norm} not negative"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise UserError(f"optim.milestones {self.milestones} must rise")


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return the learning rate of a step: a pure function, so nothing of the schedule needs saving.

    The cosine begins at ``lr`` with the first step after the warm-up and has ``min_lr`` at the last step of all; where
    that is the same step, it keeps ``lr``.
    """
    epoch = step / steps_per_epoch
    if epoch < config.warmup_epochs:
        return config.lr * (step + 1) / math.ceil(config.warmup_epochs * steps_per_epoch)
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    if config.schedule == "cosine":
        first, last = config.warmup_epochs * steps_per_epoch, epochs * steps_per_epoch - 1
        progress = (step - first) / (last - first) if last > first else 0.0
        return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.lr


def decay_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, object]]:
    """Return two parameter groups: with decay matrices and kernels, or all but critic temperatures; without it the
    rest (norms, biases and scalars: 0 or 1 dimension)."""
    temperatures = {id(critic.log_scale) for critic in module.modules() if isinstance(critic, DotCritic)}

    def decays(parameter: nn.Parameter) -> bool:
        return id(parameter) not in temperatures and (config.decay == "all" or parameter.dim() > 1)

    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if decays(p)], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if not decays(p)], "weight_decay": 0.0},
    ]


def build_optimizer(config: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser over every trainable parameter of ``module``."""
    groups = [group for group in decay_groups(module, config) if group["params"]]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
