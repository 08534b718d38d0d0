"""Tap pairs from which a search may choose, and everything of the teacher that its trials may read."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mimkd_ray.config import Config
from mimkd_ray.config.loss_presets import Kind
from mimkd_ray.errors import UserError
from mimkd_ray.search.suggest import Asked, Candidates, Options, Range, Suggest
from mimkd_ray.taps.default_stages import Stages, default_taps
from mimkd_ray.taps.dry_checks import build_without_weights
from mimkd_ray.taps.dry_run import dry_run
from mimkd_ray.taps.pairing import choose_pairs
from mimkd_ray.taps.tapped_model import find_shapes
from mimkd_ray.train.networks.build import KINDS
from mimkd_ray.train.networks.teacher_input import teacher_input

MAX_SIDE = 16
"""Largest height and width of student maps: a 32x32 map costs sixteen times as much as an 8x8 one."""

DRAWS = 512
"""Random trials from which the readings of a search are collected."""


def find_candidates(config: Config, num_classes: int, of_teacher: int = 0) -> Candidates:
    """The candidate pairs of teacher and student: those that the config names, else their stages, deepest with deepest
    and with those one stage apart, where the student's map is at most 16x16. Builds both without memory.
    ``of_teacher``: the classes of its head, if it has others."""
    its_size = teacher_input(config).size
    teacher = build_without_weights(config.teacher.name, of_teacher or num_classes, its_size)
    student = build_without_weights(config.student.name, num_classes, config.data.image_size)
    teacher_stages = default_taps(teacher, its_size)
    run = dry_run(student, config.data.image_size)
    student_stages = default_taps(student, config.data.image_size, run)
    shapes = find_shapes(student, config.data.image_size, student_stages.maps, run=run)
    small = [name for name in student_stages.maps if max(shapes[name].height, shapes[name].width) <= MAX_SIDE]
    default: dict[Kind, tuple[str, ...]] = {
        kind: tuple(
            f"{pair.teacher}:{pair.student}"
            for pair in choose_pairs(kind, teacher_stages, student_stages, shapes, config.loss.max_side)
        )
        for kind in KINDS
    }
    return Candidates(
        feature=config.loss.feature_pairs or near_pairs(teacher_stages, small),
        local=config.loss.local_pairs or tuple(f"{teacher_stages.vector}:{name}" for name in small),
        default=default,
    )


def near_pairs(teacher: Stages, student_maps: Sequence[str]) -> tuple[str, ...]:
    """Return the pairs of maps that are at most one stage apart, counted from the deepest; shallow ones first."""
    return tuple(
        f"{teacher_map}:{student_map}"
        for up_t, teacher_map in list(enumerate(reversed(teacher.maps)))[::-1]
        for up_s, student_map in list(enumerate(reversed(student_maps)))[::-1]
        if abs(up_t - up_s) <= 1
    )


def draws(build: Callable[[Suggest], Config]) -> list[tuple[Asked, Config]]:
    """Return random trials, whose numbers are at the ends of their ranges, and their configs."""
    # not `seeds.derive`: these draws determine what a search's cache must hold
    trials = [Asked(partial(_drawn, random.Random(seed))) for seed in range(DRAWS)]
    return [(trial, build(trial)) for trial in trials]


def _drawn(own: random.Random, _: str, options: Options) -> Any:
    if isinstance(options, Range):
        return options.low if own.random() < 0.5 else options.high
    return own.choice(options)


def flat_space(build: Callable[[Suggest], Config]) -> dict[str, Options]:
    """Return the widest range or all options of everything that any trial may ask for, without the conditions: for the
    searchers and schedulers that know none."""
    found: dict[str, Options] = {}
    for trial, _ in draws(build):
        for name, own in trial.asked.items():
            known = found.get(name, own)
            if isinstance(own, Range) and isinstance(known, Range):
                found[name] = Range(min(known.low, own.low), max(known.high, own.high), own.log)
            else:
                found[name] = tuple(dict.fromkeys((*known, *own)))
    return found


def widest(build: Callable[[Suggest], Config], candidates: Candidates) -> Config:
    """Return a config that reads everything of the teacher that any trial may read: the union of kinds, pairs and
    logits over many random trials. A cache that serves this config serves the whole search. Raises UserError for a name
    whose choices differ between them."""
    trials = draws(build)
    offered: dict[str, Options] = {}
    for name, own in (item for trial, _ in trials for item in trial.asked.items()):
        known = offered.setdefault(name, own)
        if isinstance(own, Range) and isinstance(known, Range):
            known = known._replace(low=own.low, high=own.high)  # which may differ
        if known != own:
            raise UserError(
                f"a search space offers {own} for {name!r} in one trial and {offered[name]} in another: give it the "
                "same choices in every trial, or another name under each condition"
            )
    losses = [config.loss for _, config in trials]
    found: dict[str, object] = {
        "kd_weight": max(loss.resolved_kd_weight for loss in losses),
        "name": tuple(dict.fromkeys(method for loss in losses for method in loss.name)),
    }
    for kind in KINDS:
        weight = max(loss.weight(kind) for loss in losses)
        pairs = dict.fromkeys(
            pair
            for loss in losses
            if loss.weight(kind)
            for pair in getattr(loss, f"{kind}_pairs") or candidates.default[kind]
        )
        found |= {f"{kind}_weight": weight, f"{kind}_pairs": tuple(pairs)}
    negatives = {loss.resolved_negatives for loss in losses}
    config = trials[0][1]
    chosen = "cache" if "cache" in negatives else config.loss.resolved_negatives
    return replace(config, loss=replace(config.loss, **found, negatives=chosen))  # type: ignore[arg-type]
