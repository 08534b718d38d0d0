"""Optimiser, weight-decay groups and learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from mimkd_ray.config import OptimConfig


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


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two parameter groups: matrices and kernels with decay; norms, biases and scalars (0 or 1 dimension) without."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(config: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser over every trainable parameter of ``module``."""
    groups = [group for group in decay_groups(module, config.weight_decay) if group["params"]]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
