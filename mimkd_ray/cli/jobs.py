"""The jobs as commands of `mimkd-ray` and scripts of jobs/, with the recipes of all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from mimkd_ray import console
from mimkd_ray.config import Config
from mimkd_ray.recipes import CIFAR_RECIPES, IMAGENET_RECIPES

PRINTS = {"--help", "-h", "--help-all", "--print-config", "ls", "verify", "gc"}
"""Arguments of a command line whose output is a text for programs or a page."""


def train(argv: Sequence[str], program: str) -> int:
    """Distil a student, by any recipe (jobs/imagenet.py and jobs/cifar100.py)."""
    from mimkd_ray.cli import command_line

    return command_line.main({**IMAGENET_RECIPES, **CIFAR_RECIPES}, "demo", argv, program)


def cache(argv: Sequence[str], program: str) -> int:
    """Plan, build and maintain caches of a teacher's features (jobs/cache_teacher.py)."""
    with _loading(argv):
        from mimkd_ray.cli import cache_teacher

    return cache_teacher.main({"custom": Config, **IMAGENET_RECIPES, **CIFAR_RECIPES}, argv, program)


def search(argv: Sequence[str], program: str) -> int:
    """Search for the best options (jobs/search.py)."""
    with _loading(argv):
        from mimkd_ray.cli import search as command

    return command.main({**IMAGENET_RECIPES, **CIFAR_RECIPES}, argv, program)


def prepare(argv: Sequence[str], program: str) -> int:
    """Prepare a data set (jobs/prepare_data.py)."""
    with _loading(argv):
        from mimkd_ray.cli import prepare_data

    return prepare_data.main(argv, program)


def evaluate(argv: Sequence[str], program: str) -> int:
    """Measure a network (jobs/evaluate.py)."""
    with _loading(argv):
        from mimkd_ray.cli import evaluate as command

    return command.main(argv, program)


def export(argv: Sequence[str], program: str) -> int:
    """Write a student for other programs (jobs/export.py)."""
    with _loading(argv):
        from mimkd_ray.cli import export as command

    return command.main(argv, program)


def _loading(argv: Sequence[str]) -> AbstractContextManager[object]:
    """A with-block around imports that take seconds. Of torchrun's processes the first tells."""
    silent = PRINTS & {*argv} or os.environ.get("RANK", "0") != "0"
    return nullcontext() if silent else console.phase("loading PyTorch")
