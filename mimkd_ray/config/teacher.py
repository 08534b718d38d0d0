"""Section `teacher`: the strong network and its expected accuracy."""

from __future__ import annotations

from dataclasses import dataclass

from mimkd_ray.errors import UserError
from mimkd_ray.secret_urls import hide, redacted


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The strong network and its expected accuracy."""

    name: str = "cifar/resnet20"
    """torchvision name, cifar/NAME, timm/NAME, hf-hub:ORG/NAME, local-dir:FOLDER or package.module:function."""
    weights: str = "random"
    """random, published, a .safetensors, .pth, .ckpt ... file (path or URL), hf-hub:ORG/NAME or local-dir:FOLDER."""
    classes: int | str = 0
    """Classes of the teacher's head: their number, or a text file with their names, one a line, of which those that the
    data has too are compared; 0: the data's."""
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
        if isinstance(self.classes, str):
            number = int(self.classes) if self.classes.strip().isdecimal() else redacted(self.classes)
            object.__setattr__(self, "classes", number)
        if self.classes == "" or (isinstance(self.classes, int) and self.classes < 0):
            raise UserError(
                f"teacher.classes is {self.classes!r}: give the number of the teacher's classes, or a file of names"
            )
        if self.train and self.classes:
            raise UserError(
                f"teacher.train is true, so that the teacher has the data's classes, and teacher.classes is "
                f"{self.classes!r}: leave one of them out"
            )
        if self.train and self.weights not in ("random", ""):
            raise UserError(
                f"teacher.train is true and teacher.weights is {self.weights!r}: either train the teacher or load it"
            )
        if not 0 <= self.expect_top1 <= 100:
            raise UserError(f"teacher.expect_top1 is {self.expect_top1}; it is a percentage")

    @property
    def has_own_classes(self) -> bool:
        """True if the head may mean other classes than the data's."""
        return self.classes != 0
