"""The fields of `python -m mimkd_ray export`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from mimkd_ray.config.data import DataConfig
from mimkd_ray.config.form.values import FROM_0, FROM_1, check_values
from mimkd_ray.errors import UserError
from mimkd_ray.secret_urls import hide

Format = Literal["onnx", "pt2", "int8", "coreml", "executorch", "litert"]
REFUSED = {"litert": "litert-torch does not install beside this package's torch"}
"""Formats that cannot be made yet, and why."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A student's files for other programs and devices, each loaded back and compared on real images."""

    network: str = ""
    """Name of the network, as `--student.name` has it; unset: the run's student."""
    weights: str = ""
    """Its weights file; unset: the run's student.safetensors, or its newest checkpoint."""
    out: str = ""
    """Folder or URL for the files; unset: RUN/export, or ./export without a run."""
    formats: tuple[Format, ...] = ("onnx", "pt2", "int8")
    """onnx: ONNX. pt2: torch.export. int8: static quantisation, two by ONNX Runtime and, where torchao is installed,
    one by PT2E; of those that hold accuracy the fastest is kept. coreml: Core ML by coremltools, compared on macOS
    alone. executorch: ExecuTorch with XNNPACK, one image at a time. litert is refused, with the reason."""
    normalize: bool = False
    """Put the normalisation into the graphs: they take images of values in 0..1 then, and normalised ones otherwise."""
    images: int = 1000
    """Held-out images on which every file is compared with the student; 0 = all."""
    calibration: int = 256
    """Training images that set the ranges of int8."""
    int8_drop: float = 1.0
    """Points of top-1 that int8 may lose on the held-out images; with a greater loss it is not kept."""
    threads: int = 0
    """Threads of the timings; 0 = the cores that this process may use."""
    push_to: str = ""
    """ORG/NAME on the Hugging Face hub to which the files are pushed at the end; unset: nothing is pushed."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images: the run's; without a run those of a CIFAR or an ImageNet recipe."""

    def __post_init__(self) -> None:
        check_values(self, images=FROM_0, threads=FROM_0, calibration=FROM_1, int8_drop=(0, 100))
        hide(self, "weights", "out")
        for name in REFUSED.keys() & set(self.formats):
            raise UserError(f"--formats {name}: {REFUSED[name]}: convert student.onnx or student.pt2 yourself")
        if self.push_to and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to):
            raise UserError(f"--push-to {self.push_to}: give ORG/NAME, a model's name on the Hugging Face hub")
