"""The names of augmentation pipelines, and the import of pipeline functions by path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mimkd_ray.errors import UserError, nearest
from mimkd_ray.user_functions import named_function

PIPELINE_NAMES = ("imagenet", "imagenet_ta", "imagenet_ra", "cifar", "cifar_ta", "digits", "none")
"""The names in data/augment/pipelines.py, in its order."""


def check_pipeline_name(name: str) -> None:
    """Raise UserError if there is no such pipeline. Only a name with a colon causes an import."""
    if ":" in name:
        pipeline_function(name)
    elif name not in PIPELINE_NAMES:
        raise UserError(
            f"pipeline '{name}' is unknown{nearest(name, PIPELINE_NAMES)}; there are: {', '.join(PIPELINE_NAMES)}, "
            "and any function of yours by its import path, 'package.module:function'"
        )


def pipeline_function(name: str) -> Callable[..., Any]:
    """Import the function "package.module:function" that makes a pipeline. Raises UserError."""
    return named_function("pipeline", name)
