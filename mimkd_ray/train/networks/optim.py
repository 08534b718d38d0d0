"""Optimiser, weight-decay groups and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mimkd_ray.config import OptimConfig
from mimkd_ray.losses.critics import DotCritic


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


def build_optimizer(config: OptimConfig, module: nn.Module, captured: bool = False) -> torch.optim.Optimizer:
    """Build the optimiser over every trainable parameter of ``module``.

    ``captured``: in the form whose steps a CUDA graph can hold: one kernel for many parameters, and the learning rate
    a tensor on the device, which the graph reads. On a CPU, where nothing is recorded, it is the ordinary one.
    """
    groups = [group for group in decay_groups(module, config) if group["params"]]
    device = next(module.parameters()).device
    options: dict[str, Any] = {"lr": config.lr}
    if captured and device.type == "cuda":
        options = {"lr": torch.tensor(config.lr, device=device), "fused": True}
        if config.name == "adamw":
            options["capturable"] = True
    if config.name == "adamw":
        return torch.optim.AdamW(groups, **options)
    optimizer = torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, **options)
    if options.get("fused") and config.momentum:
        optimizer.register_step_pre_hook(begin_momentum)
    return optimizer


def begin_momentum(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Give a momentum of zeros to parameters that have their first gradient: a step from it is a first step. torch's
    fused SGD takes only first steps of all parameters at once, and ends with a TypeError when those of a body join a
    classifier that was trained alone."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


OWN = ("lr", "fused", "foreach", "capturable")
"""What a group has for the sake of how it is run."""


def portable_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimiser's state without how it is run, so that any engine goes on from it."""
    state = optimizer.state_dict()
    plain = {"fused": None, "foreach": None, "capturable": False}
    groups = [
        {name: plain.get(name, value) for name, value in group.items()} | {"lr": float(group["lr"])}
        for group in state["param_groups"]
    ]
    return {**state, "param_groups": groups}


def load_portable(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], own_settings: bool = False) -> None:
    """Take over a state of :func:`portable_state`, to be run as this optimiser is. With ``own_settings`` only what was
    accumulated is taken over, and momentum, weight decay and the like are those of this optimiser."""
    groups = [
        {**saved, **{name: own[name] for name in own if name != "params" and (own_settings or name in OWN)}}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})
