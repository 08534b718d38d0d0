"""A cache of 60 digits in two views, which takes about a second to build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_run import tiny_config

from mimkd_ray.cache_build.build_cache import Built, build
from mimkd_ray.cache_build.build_setup import Setup
from mimkd_ray.cache_build.build_units import in_process
from mimkd_ray.config import Config

CPU = torch.device("cpu")


def cached_config(root: Path | str, **sections: dict[str, Any]) -> Config:
    """The tiny run with a cache: one map and one vector, views that the device finishes, blocks of uneven sizes."""
    own: dict[str, dict[str, Any]] = {
        "data": {"views": 2, "pipeline": "digits"},
        "teacher": {"name": "cifar/resnet8_w4"},
        "loss": {"kd_weight": 0.5},
        "cache": {"root": str(root), "shard_rows": 25, "batch": 8, "calibration_rows": 40},
    }
    for name, fields in sections.items():
        own[name] = own.get(name, {}) | fields
    return tiny_config(**own)


def build_here(config: Config) -> Built:
    """Build it in this process."""
    setup = Setup(config, CPU)
    return build(setup, in_process(setup))


def files(root: Path) -> dict[str, bytes]:
    """Everything in a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
