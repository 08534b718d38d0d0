"""The rivals of MIMKD, built by name. registry.py has their inputs and weights."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from mimkd_ray.config import LossConfig
from mimkd_ray.losses.methods.base import Rival, RivalTaps
from mimkd_ray.losses.methods.crd import TrainingRows
from mimkd_ray.losses.methods.registry import RIVALS, Method


class RivalPlan(NamedTuple):
    """A rival and the taps that it reads."""

    method: Method
    taps: RivalTaps


def build_rival(plan: RivalPlan, config: LossConfig, rows: TrainingRows | None = None) -> Rival:
    """Build the loss of a plan with the constants of ``config``. Its parameters are drawn from torch's generator.
    ``rows`` are those of the training set, for a rival with a memory bank."""
    published = RIVALS[plan.method]
    file, _, name = published.loss.partition(":")
    build: Callable[..., Rival] = getattr(import_module(f"mimkd_ray.losses.methods.{file}"), name)
    constants = [getattr(config, field) for field in published.fields]
    if published.bank:
        assert rows is not None, f"{plan.method}'s banks need the ids and labels of the training images"
        return build(plan.taps, *constants, rows)
    return build(plan.taps, *constants)
