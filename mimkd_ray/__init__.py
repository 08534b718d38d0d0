"""Mutual Information Maximization Knowledge Distillation (arXiv 2110.15946), distributed with Ray.

In a loop of your own: :func:`distill` returns a :class:`Distiller`, :class:`DistillationLoss` is the loss behind it,
:func:`mutual_information` estimates by itself. With a config: :func:`run`, the functions in :mod:`mimkd_ray.recipes`.
With Ray Tune: :func:`search`, and :func:`trainable` for a `Tuner` of your own.

Names are imported when they are asked for, and none of them imports Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimkd_ray import recipes as recipes
    from mimkd_ray.cli.evaluate import evaluate_run as evaluate_run
    from mimkd_ray.cli.search_from_python import search as search
    from mimkd_ray.cli.search_from_python import trainable as trainable
    from mimkd_ray.cli.training import run as run
    from mimkd_ray.config import CacheConfig as CacheConfig
    from mimkd_ray.config import CompareConfig as CompareConfig
    from mimkd_ray.config import Config as Config
    from mimkd_ray.config import CriticConfig as CriticConfig
    from mimkd_ray.config import DataConfig as DataConfig
    from mimkd_ray.config import LaunchConfig as LaunchConfig
    from mimkd_ray.config import LossConfig as LossConfig
    from mimkd_ray.config import MixConfig as MixConfig
    from mimkd_ray.config import ModelConfig as ModelConfig
    from mimkd_ray.config import OptimConfig as OptimConfig
    from mimkd_ray.config import RunConfig as RunConfig
    from mimkd_ray.config import StorageConfig as StorageConfig
    from mimkd_ray.config import TeacherConfig as TeacherConfig
    from mimkd_ray.config import TrainConfig as TrainConfig
    from mimkd_ray.config.jobs.evaluate import EvaluateConfig as EvaluateConfig
    from mimkd_ray.errors import UserError as UserError
    from mimkd_ray.losses.bounds import dv as dv
    from mimkd_ray.losses.bounds import infonce as infonce
    from mimkd_ray.losses.bounds import jsd as jsd
    from mimkd_ray.losses.bounds import nwj as nwj
    from mimkd_ray.losses.bounds import smile as smile
    from mimkd_ray.losses.features import Features as Features
    from mimkd_ray.losses.mimkd_loss import MIMKDLoss
    from mimkd_ray.losses.mutual_information import mutual_information as mutual_information
    from mimkd_ray.losses.terms import Term as Term
    from mimkd_ray.models.build_model import build_model as build_model
    from mimkd_ray.recipes import cifar100 as cifar100
    from mimkd_ray.recipes import demo as demo
    from mimkd_ray.recipes import r34_r18 as r34_r18
    from mimkd_ray.recipes import r50_mbv2 as r50_mbv2
    from mimkd_ray.recipes import r50_shufflenetv2 as r50_shufflenetv2
    from mimkd_ray.taps.default_stages import default_taps as default_taps
    from mimkd_ray.taps.tapped_model import TappedModel as TappedModel
    from mimkd_ray.taps.tapped_model import find_shapes as find_shapes
    from mimkd_ray.train.distiller import Distiller as Distiller
    from mimkd_ray.train.distiller import distill as distill
    from mimkd_ray.train.held_out.evaluate_network import evaluate as evaluate

    DistillationLoss = MIMKDLoss  # not by an alias of the import, which type checkers take for private

__version__ = "0.2.0"

_HOMES = {
    "cli.evaluate": ("evaluate_run",),
    "cli.training": ("run",),
    "cli.search_from_python": ("trainable",),
    "config": (
        "CacheConfig",
        "CompareConfig",
        "Config",
        "CriticConfig",
        "DataConfig",
        "LaunchConfig",
        "LossConfig",
        "MixConfig",
        "ModelConfig",
        "OptimConfig",
        "RunConfig",
        "StorageConfig",
        "TeacherConfig",
        "TrainConfig",
    ),
    "config.jobs.evaluate": ("EvaluateConfig",),
    "errors": ("UserError",),
    "losses.bounds": ("dv", "infonce", "jsd", "nwj", "smile"),
    "losses.mimkd_loss": ("DistillationLoss",),
    "losses.mutual_information": ("mutual_information",),
    "losses.features": ("Features",),
    "losses.terms": ("Term",),
    "models.build_model": ("build_model",),
    "recipes": ("cifar100", "demo", "r34_r18", "r50_mbv2", "r50_shufflenetv2"),
    "taps.default_stages": ("default_taps",),
    "taps.tapped_model": ("TappedModel", "find_shapes"),
    "train.held_out.evaluate_network": ("evaluate",),
    "train.distiller": ("Distiller", "distill"),
}
"""The module that defines each public name, for the import at run time."""

_WITHIN = {"DistillationLoss": "MIMKDLoss"}
"""Public names that differ from the name in their module."""

__all__ = sorted(["recipes", "search", *(name for names in _HOMES.values() for name in names)])


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for first (PEP 562)."""
    if name in ("recipes", "search"):  # the latter is a package that can be called
        return import_module(f"mimkd_ray.{name}")
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"mimkd_ray.{home}"), _WITHIN.get(name, name))
            globals()[name] = value
            return value
    raise AttributeError(f"module 'mimkd_ray' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, including those that have not been imported yet."""
    return sorted({*globals(), *__all__})
