"""The distiller in a LightningModule: precision, devices and accumulation are the Trainer's.

pip install lightning && python examples/with_lightning.py
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from small_digits import Network, batches
from torch import Tensor, nn

import mimkd_ray


class Distillation(lightning.LightningModule):
    """Trains ``student``; the teacher is in no checkpoint, for it is part of the distiller alone."""

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        super().__init__()
        self.distiller = mimkd_ray.distill(teacher, student, image_size=8)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], _: int) -> Tensor:
        loss = self.distiller(*batch)
        self.log_dict(loss.log)
        return loss.total

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        self.distiller.after_step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.distiller.parameters(), lr=0.02, momentum=0.9)


def main(epochs: int = 8, **trainer: Any) -> Distillation:
    """Train a student of a random teacher. ``trainer``: options of lightning.Trainer. Returns what was trained."""
    lightning.seed_everything(0)
    module = Distillation(teacher=Network(width=32), student=Network(width=4))
    lightning.Trainer(max_epochs=epochs, **trainer).fit(module, batches()[0])
    return module


if __name__ == "__main__":
    main()
