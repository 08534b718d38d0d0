"""Held-out figures of fixed weights, measured once and kept beside the run directories for all runs there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from mimkd_ray import storage
from mimkd_ray.config import Config
from mimkd_ray.data.sources.data_set import Data
from mimkd_ray.json_files import read_if_sound
from mimkd_ray.train.distributed import ask_first
from mimkd_ray.train.networks.device_settings import parameter_dtype
from mimkd_ray.train.networks.teacher_head import TeacherHead
from mimkd_ray.train.networks.teacher_input import teacher_input
from mimkd_ray.train.records.run_dir import write_json

FOLDER = "evaluations"


def beside(run_dir: str, *names: str) -> str:
    """A place beside a run directory, which all runs with the same `run.root` share."""
    return storage.join(run_dir.rstrip("/").rpartition("/")[0], *names)


def known_or_measured(
    weights_sha256: str,
    head: TeacherHead,
    config: Config,
    data: Data,
    labels: str,
    run_dir: str,
    measure: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    """Return top1, top5 and rows of a network, from an earlier run or ``measure()``. ``labels``: their digest, where
    that of the data does not cover them. Every worker calls it."""
    what = {
        "weights": weights_sha256,
        "network": config.teacher.name,
        "held_out": data.val.digest + labels,
        "classes": (data.num_classes, head.count, repr(head.shared)),
        "input": repr(teacher_input(config)),
        **{key: getattr(config.data, key) for key in ("pipeline", "image_size", "mean", "std", "max_pixels", "exif")},
        "precision": str(parameter_dtype(config.train)),
    }
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]
    url = beside(run_dir, FOLDER, f"{key}.json")
    known = ask_first(lambda: read_if_sound(url, {"figures": dict}, "it is measured again"))
    if known is None:
        known = made = {"of": what, "figures": dict(measure())}
        ask_first(lambda: write_json(url, made))
    figures: dict[str, Any] = known["figures"]
    return figures
