"""Checks of a teacher before the student trains: its weights are not random, its held-out top-1 is above chance and
near what the recipe expects."""

from __future__ import annotations

import math

from mimkd_ray.config import TeacherConfig
from mimkd_ray.errors import UserError
from mimkd_ray.models.weights_file import FOLDER, HUB, shown


def refuse_random(config: TeacherConfig) -> None:
    """Raise UserError for a teacher of random weights that nobody asked for. A function may load its own."""
    brings_weights = ":" in config.name and not config.name.startswith((HUB, FOLDER))
    if config.weights == "random" and not (config.trains or brings_weights or config.allow_chance):
        raise UserError(
            f"teacher {config.name} has random weights, and nothing to teach: pass --teacher.weights published or a "
            "file, or --teacher.train true, which trains it first; --teacher.allow-chance true distils from it as it is"
        )


def chance_limit(classes: int, rows: int) -> float:
    """Return the top-1 in percent below which a network may be guessing among ``classes``: three standard deviations
    above chance, and on few images at most half way from chance to 100 %."""
    chance = 1 / classes
    return 100 * (chance + min(3 * math.sqrt(chance * (1 - chance) / max(rows, 1)), (1 - chance) / 2))


def check_accuracy(config: TeacherConfig, top1: float, rows: int, classes: int) -> None:
    """Compare the teacher's held-out top-1 (percent) with chance among ``classes``, and with what the recipe
    expects."""
    limit = chance_limit(classes, rows)
    if top1 < limit and not config.allow_chance:
        remedy = (
            "train it longer (--teacher.epochs, --teacher.lr)"
            if config.trains
            else "check weights, class order, data.mean/std and data.image_size (or teacher.mean/std and image_size)"
        )
        raise UserError(
            f"teacher {config.name} with weights {shown(config.weights)} reaches {top1:.2f} % top-1 on {rows:,} "
            f"held-out images of {classes} classes; chance is {100 / classes:.2f} %, and below {limit:.2f} % it cannot "
            f"be told from it: {remedy}, or pass --teacher.allow-chance true"
        )
    if config.expect_top1 and not config.trains and top1 < config.expect_top1 - config.tolerance:
        raise UserError(
            f"teacher {config.name} with weights {shown(config.weights)} reaches {top1:.2f} % top-1 on {rows:,} "
            f"held-out images; {config.expect_top1:.2f} % was expected: check weights, class order, data.mean/std "
            "and data.image_size (or teacher.mean/std and image_size), or pass --teacher.expect-top1 0"
        )
