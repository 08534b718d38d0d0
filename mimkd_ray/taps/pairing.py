"""Conversion of configured (or automatic) tap pairs to the terms of a loss, checked against the networks' real
shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from mimkd_ray.config import LossConfig
from mimkd_ray.config.form.values import LARGEST
from mimkd_ray.config.loss_presets import Kind
from mimkd_ray.errors import UserError
from mimkd_ray.losses.terms import Term
from mimkd_ray.taps.default_stages import Stages
from mimkd_ray.taps.tapped_model import TapShape

_PAIR = re.compile(r"(?P<teacher>[^:]+):(?P<student>[^:]+)(:(?P<factor>\d+(\.\d*)?([eE][+-]?\d+)?))?")


class Pair(NamedTuple):
    """A teacher tap, a student tap, and a factor on the kind's weight."""

    teacher: str
    student: str
    factor: float = 1.0


def parse_pair(text: str) -> Pair:
    """Parse "teacher:student" or "teacher:student:factor"."""
    match = _PAIR.fullmatch(text)
    if match and float(match["factor"] or 1.0) <= LARGEST:
        return Pair(match["teacher"], match["student"], float(match["factor"] or 1.0))
    raise UserError(f"tap pair {text!r} is not 'teacher_layer:student_layer' or 'teacher_layer:student_layer:weight'")


def choose_pairs(
    kind: Kind,
    teacher: Stages,
    student: Stages,
    student_shapes: Mapping[str, TapShape],
    max_side: int,
) -> list[Pair]:
    """Return the pairs of a kind for which the config names none: vectors with vectors, and stages paired from the
    deepest up, if the student's map is at most ``max_side`` high and wide; if none is, its deepest, such as the 16x16
    places of a transformer of patch 14 at 224 px. Local terms pair the teacher's vector only with the deepest of these
    student maps: with a 14x14 map as well they cost more than twice as much."""
    if kind == "global":
        return [Pair(teacher.vector, student.vector)]
    small = [name for name in student.maps if max(student_shapes[name].height, student_shapes[name].width) <= max_side]
    pairs = list(zip(reversed(teacher.maps), reversed(small or student.maps[-1:]), strict=False))[::-1]
    if not pairs:
        raise UserError(
            f"no map to pair for the {kind} terms (teacher stages: {', '.join(teacher.maps) or 'none'}; "
            f"student stages: {', '.join(student.maps) or 'none'}): "
            f"name them with --loss.{kind}-pairs TEACHER:STUDENT or pass --loss.{kind}-weight 0"
        )
    if kind == "local":
        return [Pair(teacher.vector, pairs[-1][1])]
    return [Pair(*pair) for pair in pairs]


def configured_pairs(config: LossConfig, kind: Kind) -> list[Pair]:
    """Return the pairs that the config names for a kind."""
    return [parse_pair(text) for text in getattr(config, f"{kind}_pairs")]


def build_terms(
    config: LossConfig,
    pairs: Mapping[Kind, list[Pair]],
    teacher_shapes: Mapping[str, TapShape],
    student_shapes: Mapping[str, TapShape],
) -> list[Term]:
    """Return the terms with their channel counts. Raises UserError for a vector if a map is needed."""
    terms = []
    for kind, kind_pairs in pairs.items():
        shares = len(kind_pairs) if config.pair_weights == "shared" else 1
        for pair in kind_pairs:
            teacher, student = teacher_shapes[pair.teacher], student_shapes[pair.student]
            for who, shape, needs_map in (
                ("teacher", teacher, kind == "feature"),
                ("student", student, kind in ("local", "feature")),
            ):
                if needs_map and shape.kind == "vector":
                    raise UserError(
                        f"the {kind} term {pair.teacher}:{pair.student} needs a map, and {who} layer {shape.name!r} "
                        f"gives a vector of {shape.channels}: name an earlier layer "
                        "(`python -m mimkd_ray layers` lists them)"
                    )
            terms.append(
                Term(
                    kind=kind,
                    teacher=pair.teacher,
                    student=pair.student,
                    weight=config.weight(kind) * pair.factor / shares,
                    teacher_channels=teacher.channels,
                    student_channels=student.channels,
                )
            )
    return terms
