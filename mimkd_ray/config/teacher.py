"""Section `teacher`: the strong network and its expected accuracy."""

from __future__ import annotations

from dataclasses import dataclass

from mimkd_ray.errors import UserError
from mimkd_ray.secret_urls import hide


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The strong network and its expected accuracy."""

    name: str = "cifar/resnet20"
    """torchvision name, cifar/NAME, timm/NAME, hf-hub:ORG/NAME, local-dir:FOLDER or package.module:function."""
    weights: str = "random"
    """random, published, a .safetensors, .pth, .ckpt ... file (path or URL), hf-hub:ORG/NAME or local-dir:FOLDER."""
    train: bool = False
    """Train the teacher first, on the same data with labels only; a finished teacher is reused."""
    epochs: int = 0
    """Epochs of that training; 0: those of the student."""
    lr: float = 0.0
    """Peak learning rate of that training; 0: that of the student."""
    expect_top1: float = 0.0
    """Top-1 in percent that the teacher must reach on held-out images before training starts; 0: unknown."""
    tolerance: float = 2.0
    """Percentage points below expect_top1 that are still accepted."""

    def __post_init__(self) -> None:
        hide(self, "weights")
        if self.train and self.weights not in ("random", ""):
            raise UserError(
                f"teacher.train is true and teacher.weights is {self.weights!r}: either train the teacher or load it"
            )
        if not 0 <= self.expect_top1 <= 100:
            raise UserError(f"teacher.expect_top1 is {self.expect_top1}; it is a percentage")
