"""What an evaluation measures."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from mimkd_ray.config.config import Config
from mimkd_ray.config.form.values import FROM_0, FROM_1, check_values
from mimkd_ray.secret_urls import hide


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """The measurements, and where they go."""

    network: Literal["student", "best", "teacher"] = "student"
    """Which network of a run: its student, that at its best held-out accuracy (run.keep_best), or its teacher."""
    out: str = ""
    """Folder or URL for evaluation.json and predictions.parquet; unset: the run's directory, or the current folder."""
    rows: int = 0
    """Images to evaluate on, evenly spaced over the set; 0: all."""
    train_rows: int = 5000
    """Most training images whose features k-NN and the linear probe learn from; 0: neither is measured."""
    tap_rows: int = 4096
    """Most evaluated images for mutual information and CKA of the taps, which take 128; 0: they are not measured."""
    corruptions: bool = False
    """Measure top-1 under corruptions of the images: seven kinds in five severities, 35 passes in all."""
    corruption_rows: int = 2000
    """Most images for the corruptions."""
    classes: str = ""
    """File with the names of the network's classes, one a line, in its order; unset: those of the data of the run."""
    real: str = ""
    """File with the labels of ImageNet-ReaL (real.json), a list with the numbers of the right classes of each
    validation image: gives another top-1 beside the usual one."""

    def __post_init__(self) -> None:
        check_values(self, "eval", rows=FROM_0, train_rows=FROM_0, tap_rows=FROM_0, corruption_rows=FROM_1)
        hide(self, "out", "classes", "real")


@dataclass(frozen=True, kw_only=True)
class EvaluateJob(Config):
    """The networks and the data of a run, and what is measured."""

    eval: EvaluateConfig = field(default_factory=EvaluateConfig)
    """The evaluation."""

    def _check_workers(self) -> None:
        """Any number of workers takes part: images are dealt without lanes."""


def evaluate_job(config: Config, **changes: Any) -> EvaluateJob:
    """Return a config with the fields of an evaluation added."""
    own = {f.name: getattr(config, f.name) for f in fields(Config)}
    return EvaluateJob(**(own | changes))
