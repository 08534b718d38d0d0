"""Tap pairs from which a search may choose, and everything of the teacher that its trials may read."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from mimkd_ray.config import Config
from mimkd_ray.config.loss_presets import Kind
from mimkd_ray.errors import UserError
from mimkd_ray.search.suggest import Candidates, Suggest, check_choices, check_range
from mimkd_ray.search.trials import Value
from mimkd_ray.taps.default_stages import Stages, default_taps
from mimkd_ray.taps.dry_checks import build_without_weights
from mimkd_ray.taps.pairing import choose_pairs
from mimkd_ray.taps.tapped_model import find_shapes
from mimkd_ray.taps.tracing import dry_run
from mimkd_ray.train.networks.build import KINDS
from mimkd_ray.train.networks.teacher_input import teacher_input

MAX_SIDE = 16
"""Largest height and width of student maps: a 32x32 map costs sixteen times as much as an 8x8 one."""

DRAWS = 512
"""Random trials from which the readings of a search are collected."""

V = TypeVar("V", bound=Value)


class Range(NamedTuple):
    """The numbers from low to high; ``log``: evenly spaced by factors."""

    low: float
    high: float
    log: bool


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


class _Draw:
    """A `Suggest` with random answers."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # not `seeds.derive`: these draws determine what a search's cache must hold
        self.asked: dict[str, Range | tuple[Any, ...]] = {}

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        check_range(name, low, high, log)
        self.asked[name] = Range(low, high, log)
        return low if self.random.random() < 0.5 else high

    def suggest_categorical(self, name: str, choices: Sequence[V]) -> V:
        check_choices(name, choices)
        self.asked[name] = tuple(choices)
        return self.random.choice(choices)


def flat_space(build: Callable[[Suggest], Config]) -> dict[str, Range | tuple[Any, ...]]:
    """Return the widest range or all options of everything that any trial may ask for, without the conditions: for the
    searchers and schedulers that know none."""
    found: dict[str, Range | tuple[Any, ...]] = {}
    for seed in range(DRAWS):
        draw = _Draw(seed)
        build(draw)
        for name, own in draw.asked.items():
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
    trials = [_Draw(seed) for seed in range(DRAWS)]
    draws = [build(trial) for trial in trials]
    offered: dict[str, Range | tuple[Any, ...]] = {}
    for name, own in (item for trial in trials for item in trial.asked.items()):
        if offered.setdefault(name, own) != own and not isinstance(own, Range):
            raise UserError(
                f"a search space offers {own} for {name!r} in one trial and {offered[name]} in another: give it the "
                "same choices in every trial, or another name under each condition"
            )
    found: dict[str, object] = {
        "kd_weight": max(draw.loss.resolved_kd_weight for draw in draws),
        "name": tuple(dict.fromkeys(method for draw in draws for method in draw.loss.name)),
    }
    for kind in KINDS:
        weight = max(draw.loss.weight(kind) for draw in draws)
        pairs = dict.fromkeys(
            pair
            for draw in draws
            if draw.loss.weight(kind)
            for pair in getattr(draw.loss, f"{kind}_pairs") or candidates.default[kind]
        )
        found |= {f"{kind}_weight": weight, f"{kind}_pairs": tuple(pairs)}
    negatives = {draw.loss.resolved_negatives for draw in draws}
    first = draws[0].loss
    chosen = "cache" if "cache" in negatives else first.resolved_negatives
    return replace(draws[0], loss=replace(first, **found, negatives=chosen))  # type: ignore[arg-type]
