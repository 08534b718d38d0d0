"""A cache of 60 digits in two views, which takes about a second to build."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_run import cpu, tiny_config

from mimkd_ray.cache_build.build_cache import Built, build
from mimkd_ray.cache_build.build_setup import Setup
from mimkd_ray.cache_build.build_units import in_process
from mimkd_ray.config import Config
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.train.engine.student import lone_student
from mimkd_ray.train.networks.build import build_network
from mimkd_ray.train.networks.teacher_head import teacher_head

CPU = torch.device("cpu")
STEPS = 4


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


def live(config: Config) -> Config:
    """The same run with the teacher at work."""
    return replace(config, cache=replace(config.cache, live=True))


def walk(config: Config, run_dir: Path) -> dict[str, Any]:
    """Some steps over both epochs: what each lane was fed, the losses, and the first gradient."""
    data = open_data(config.data)
    network = build_network(config, teacher_head(config, data).count, config.teacher.weights)
    student = lone_student(config, data, network, cpu(), str(run_dir))
    seen: dict[str, Any] = {"features": [], "losses": [], "samples": []}
    real = student.inputs.step

    def step(*arguments: Any) -> Any:
        for lane in real(*arguments):
            seen["features"].append(lane.teacher)
            seen["samples"].append((lane.number, lane.view, lane.ids_B.tolist()))
            yield lane

    student.inputs.step = step  # type: ignore[method-assign]
    student.inputs.start(0)
    for number in range(STEPS):
        record = student.step(number)
        seen["losses"].append(float(record.log["loss"]))
        seen["log"] = record.log
        if number == 0:
            seen["gradient"] = torch.cat([p.grad.flatten() for p in student.distiller.parameters()])
    return seen
