"""Section `optim`: the optimiser of student and critics, and its schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mimkd_ray.config.form.values import FROM_0, check_values
from mimkd_ray.errors import UserError


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
    """Weight decay of the parameters that `decay` selects."""
    decay: Literal["weights", "all"] = "weights"
    """weights: norms and biases do not decay. all: every parameter decays, as in the standard CIFAR protocol. Critic
    temperatures never decay."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """step: times gamma at each milestone. cosine: falls to min_lr, reached at the last step."""
    milestones: tuple[int, ...] = (150, 180, 210)
    """Epochs at which the step schedule drops."""
    gamma: float = 0.1
    """Factor of each drop."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0."""
    min_lr: float = 0.0
    """Learning rate of the last step of the cosine schedule."""
    clip_norm: float = 0.0
    """Largest global L2 norm of the gradient; larger ones are scaled down. 0: no clipping."""

    def __post_init__(self) -> None:
        factors = {"lr": (-1000, 1000), "min_lr": (0, 1000), "weight_decay": (0, 1000), "gamma": (-1000, 1000)}
        others = {"warmup_epochs": FROM_0, "clip_norm": FROM_0, "milestones": FROM_0}
        check_values(self, "optim", **factors, **others)
        if self.lr <= 0:
            raise UserError(f"optim.lr is {self.lr}: give a rate above 0")
        if not 0 <= self.momentum < 1 or (self.nesterov and not self.momentum):
            raise UserError(
                f"optim.momentum is {self.momentum} and nesterov {self.nesterov}: give 0 or more and below 1, and more "
                "than 0 with nesterov"
            )
        if self.min_lr > self.lr or self.gamma <= 0:
            raise UserError(
                f"optim.min_lr is {self.min_lr} and gamma {self.gamma}: give 0 to optim.lr, "
                f"{self.lr}, and a factor above 0"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise UserError(f"optim.milestones are {self.milestones}: give epochs that rise")
