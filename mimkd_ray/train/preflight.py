"""Everything that can be known to be wrong before workers are started, and paid for."""

from __future__ import annotations

import torch

from mimkd_ray import storage
from mimkd_ray.data.dataset import open_data
from mimkd_ray.errors import UserError
from mimkd_ray.models.zoo import build_model
from mimkd_ray.train.build import make_order, plan_taps
from mimkd_ray.train.config import Config
from mimkd_ray.train.job import needs_teacher


def preflight(config: Config) -> None:
    """Raise UserError for missing data, wrong class counts, impossible layers, weights that do not fit.

    Reads listings, footers and weights; builds the networks without memory (on the meta device) and runs them dry.
    """
    data = open_data(config.data)
    make_order(config, data.train)
    for weights in (config.teacher.weights, config.student.weights):
        if weights not in ("random", "published") and not storage.exists(weights):
            raise UserError(f"there is no weights file {weights}")
    with torch.device("meta"):
        student = build_model(config.student.name, data.num_classes, "random", config.data.image_size)
        if needs_teacher(config):
            teacher = build_model(config.teacher.name, data.num_classes, "random", config.data.image_size)
    if needs_teacher(config):
        plan_taps(config.loss, teacher, student, config.data.image_size, config.cache)
    for name, weights in (
        (config.teacher.name, config.teacher.weights if needs_teacher(config) else "random"),
        (config.student.name, config.student.weights),
    ):
        if weights not in ("random", "published"):
            build_model(name, data.num_classes, weights, config.data.image_size)
