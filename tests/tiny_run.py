"""A job on digits that takes about a second, for tests."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mimkd_ray.cli.local_launch import LocalContext
from mimkd_ray.config import (
    Config,
    CriticConfig,
    DataConfig,
    LaunchConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
)
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.train.job import run_job


def tiny_config(**sections: dict[str, Any]) -> Config:
    """Two epochs of three steps, two lanes of ten images, MIMKD from a random teacher. Sections override fields."""
    config = Config(
        recipe="tiny",
        data=DataConfig(root="digits", subset=60, loader_workers=0),
        teacher=TeacherConfig(name="cifar/resnet8", allow_chance=True),
        student=ModelConfig(name="cifar/resnet8_w4"),
        loss=LossConfig(preset="two_sided", feature_pairs=("stage3:stage3",), critic=CriticConfig(width=16)),
        optim=OptimConfig(lr=0.05, schedule="cosine"),
        train=TrainConfig(epochs=2, lanes=2, lane_batch=10, log_every=1, eval_batch=150, information_rows=30),
        run=RunConfig(tensorboard=False),
        launch=LaunchConfig(backend="local"),
    )
    return replace(config, **{name: replace(getattr(config, name), **fields) for name, fields in sections.items()})


def cpu() -> LocalContext:
    """A plain process."""
    return LocalContext(torch.device("cpu"))


def run_tiny(folder: Path | str, **sections: dict[str, Any]) -> dict[str, Any]:
    """Run it in ``folder``."""
    return run_job(tiny_config(**sections), cpu(), str(folder))


def wait_for_checkpoints() -> None:
    """Return when everything that a run left in its threads is committed: after an error they write on."""
    for thread in threading.enumerate():
        if thread.name.startswith("checkpoint "):
            thread.join()


def tiny_data(config: Config | None = None) -> Any:
    """Its data."""
    return open_data((config or tiny_config()).data)


def of_a_thousand(num_classes: int) -> nn.Module:
    """Of ImageNet's classes, whatever it is asked for."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000))
