"""Section `compare`: arms and seeds that are trained with one start of the workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mimkd_ray.config.form.values import FROM_0, check_values
from mimkd_ray.errors import UserError
from mimkd_ray.losses.methods.registry import Method

Arm = Literal["alone"] | Method


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Training of the same student with several losses and seeds, with one start of the workers."""

    seeds: int = 0
    """Seeds of every arm; a seed sets the student's initialisation, the order and (with data.subset) the training rows.
    0: no comparison, one run of the config."""
    arms: tuple[Arm, ...] = ("alone", "mimkd")
    """alone: cross-entropy only, with weight 1. kd: cross-entropy and Hinton's KD. mimkd: the config's loss. A rival of
    loss.name: the config's loss with that rival in place of loss.name."""
    kd_weight: float = 1.0
    """Weight of the KD term in the kd arm."""

    def __post_init__(self) -> None:
        check_values(self, "compare", seeds=(0, 10_000), kd_weight=FROM_0)
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise UserError(f"compare.arms is {' '.join(self.arms) or 'empty'}: name each arm once")
