"""Section `compare`: arms and seeds that are trained in one start of the workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mimkd_ray.errors import UserError
from mimkd_ray.losses.methods.registry import Method

Arm = Literal["alone"] | Method


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Train the same student in several ways and over several seeds, in one start of the workers."""

    seeds: int = 0
    """Seeds of every arm; a seed draws the student's start, the order and (with data.subset) the training rows.
    0: no comparison, one run of the config as it stands."""
    arms: tuple[Arm, ...] = ("alone", "mimkd")
    """alone: cross-entropy only. kd: that and Hinton's KD. mimkd: the config's loss. A rival of loss.name: the config's
    loss with that rival in the place of what it names."""
    kd_weight: float = 1.0
    """Weight of the KD term in the kd arm."""

    def __post_init__(self) -> None:
        if self.seeds < 0 or not self.arms or len(set(self.arms)) != len(self.arms):
            raise UserError(f"compare.seeds {self.seeds} must not be negative and compare.arms {self.arms} not repeat")
