"""Section `teacher`: the strong network and its expected accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mimkd_ray.config.data import LARGEST_SIDE
from mimkd_ray.config.form.values import FROM_0, LARGEST, check_values
from mimkd_ray.errors import UserError
from mimkd_ray.secret_urls import hide, redacted

Interpolation = Literal["bilinear", "bicubic"]


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
    input: Literal["auto", "own", "data"] = "auto"
    """The teacher's images are the student's views. own: resized and normalised as its publishers say (timm's
    pretrained_cfg, the transforms of torchvision's weights). data: as the student's. auto: own if the weights are
    `published`, else data."""
    image_size: int = 0
    """Height and width of its images, in pixels; 0: as `input` says."""
    mean: tuple[float, ...] = ()
    """Mean of each colour channel that its images are normalised by; unset: as `input` says."""
    std: tuple[float, ...] = ()
    """Standard deviation of each colour channel; unset: as `input` says."""
    interpolation: Literal["", "bilinear", "bicubic"] = ""
    """By which its images are resized; unset: as `input` says, bicubic where that says nothing."""
    train: bool = False
    """Train the teacher first, on the same data with labels only. It is trained once for all runs of a `run.root`,
    whatever their loss."""
    finetune: bool = False
    """Train it so from `weights`; where they are of other classes, with a new head."""
    head_epochs: int = 1
    """Epochs at the start of a fine-tuning in which the head alone is trained."""
    epochs: int = 0
    """Epochs of that training; 0: those of the student."""
    lr: float = 0.0
    """Peak learning rate of that training; 0: that of the student."""
    expect_top1: float = 0.0
    """Top-1 in percent that the teacher must reach on held-out images before training starts; 0: unknown. Not that of
    a teacher which the run trains or fine-tunes: recipes have the figure of published weights."""
    tolerance: float = 2.0
    """Percentage points below expect_top1 that are still accepted."""
    allow_chance: bool = False
    """Distil from a teacher with random weights, or whose top-1 is that of chance; it is refused otherwise."""

    def __post_init__(self) -> None:
        percent = {"expect_top1": (0, 100), "tolerance": (0, 100)}
        steps = {"head_epochs": (0, 10**6), "epochs": FROM_0, "lr": FROM_0, "image_size": (0, LARGEST_SIDE)}
        check_values(self, "teacher", classes=(-LARGEST, 10**6), **percent, **steps)
        hide(self, "weights")
        if isinstance(self.classes, str):
            number = int(self.classes) if self.classes.strip().isdecimal() else redacted(self.classes)
            object.__setattr__(self, "classes", number)
        if self.classes == "" or (isinstance(self.classes, int) and self.classes < 0):
            raise UserError(
                f"teacher.classes is {self.classes!r}: give the number of the teacher's classes, or a file of names"
            )
        self._check_input()
        if self.trains and self.classes:
            raise UserError(
                f"teacher.{self._how} is true, so that the teacher has the data's classes, and teacher.classes is "
                f"{self.classes!r}: leave one of them out"
            )
        if self.train and self.weights not in ("random", ""):
            raise UserError(
                f"teacher.train is true and teacher.weights is {self.weights!r}: train the teacher (--teacher.weights "
                "random), start from these weights (--teacher.finetune true) or load it"
            )
        if self.finetune and self.weights in ("random", ""):
            raise UserError(
                f"teacher.finetune is true and teacher.weights is {self.weights!r}: fine-tuning starts from weights; "
                "pass --teacher.weights published or a file"
            )

    def _check_input(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values and len(values) != 3:
                raise UserError(f"teacher.{name} is {values}: give three numbers, of values in 0..1")
        if any(value <= 0 for value in self.std):
            raise UserError(f"teacher.std is {self.std}: give three positive deviations of values in 0..1")
        if self.trains and (self.input == "own" or self.image_size or self.mean or self.std):
            raise UserError(
                f"teacher.{self._how} is true, which trains it on the student's images, and teacher.input, image_size, "
                "mean or std gives it others: leave those out"
            )

    @property
    def has_own_classes(self) -> bool:
        """True if the head may mean other classes than the data's."""
        return self.classes != 0

    @property
    def trains(self) -> bool:
        """True if the run trains the teacher first, from scratch or from weights."""
        return self.train or self.finetune

    @property
    def _how(self) -> str:
        return "train" if self.train else "finetune"
