"""The taps that rivals read of teacher and student, automatic or configured; a cache's codec may not reduce them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mimkd_ray.config import CacheConfig, LossConfig
from mimkd_ray.config.form.codec_spec import parse_logits
from mimkd_ray.errors import UserError
from mimkd_ray.losses.methods.base import RivalTaps, Side, TapPair
from mimkd_ray.losses.methods.build_method import RivalPlan
from mimkd_ray.losses.methods.registry import RIVALS, Method
from mimkd_ray.taps.default_stages import Stages
from mimkd_ray.taps.pairing import Pair, parse_pair
from mimkd_ray.taps.tap_codecs import tap_entry
from mimkd_ray.taps.tapped_model import TapShape
from mimkd_ray.teacher_cache.codec import coded_shape


class RivalPairs(NamedTuple):
    """Names of the taps of one rival."""

    method: Method
    vectors: Sequence[Pair]
    maps: Sequence[Pair]


def reads_taps(loss: LossConfig) -> bool:
    """Return whether any rival reads more than logits."""
    return any(RIVALS[method].vectors or RIVALS[method].maps != "none" for method in loss.rivals)


def pair_rivals(loss: LossConfig, teacher: Stages, student: Stages) -> list[RivalPairs]:
    """Return the taps of every rival: the pooled vectors, and the configured pairs of maps or those of the stages.

    Stages pair from the deepest up. "second" is the second of these pairs, which is the hint layer of the benchmark for
    CIFAR networks (its number 2 after the stem's 0); if there is only one pair, it is that one.
    """
    named = [parse_pair(text) for text in loss.rival_pairs]
    if any(pair.factor != 1 for pair in named):
        raise UserError(
            f"loss.rival_pairs {' '.join(loss.rival_pairs)}: rivals have one weight for all their pairs; give "
            "teacher_layer:student_layer, and --loss.rival-weight for the weight"
        )
    stages = [Pair(*names) for names in zip(reversed(teacher.maps), reversed(student.maps), strict=False)][::-1]
    chosen = {"none": [], "second": stages[:2][-1:], "deepest": stages[-1:], "all": stages}
    return [
        RivalPairs(
            method,
            [Pair(teacher.vector, student.vector)] if RIVALS[method].vectors else [],
            (named or chosen[RIVALS[method].maps]) if RIVALS[method].maps != "none" else [],
        )
        for method in loss.rivals
    ]


def plan_rivals(
    pairs: Sequence[RivalPairs],
    teacher_shapes: Mapping[str, TapShape],
    student_shapes: Mapping[str, TapShape],
    cache: CacheConfig,
) -> tuple[RivalPlan, ...]:
    """Return the plans of rivals. Raises UserError for a vector if a map is needed, and for a codec of ``cache`` that
    removes part of the teacher's features that the rival's formula needs."""
    plans = []
    for rival in pairs:
        vectors = [
            TapPair(_vector(teacher_shapes[pair.teacher]), _vector(student_shapes[pair.student]))
            for pair in rival.vectors
        ]
        maps = [
            TapPair(
                _map(rival.method, "teacher", teacher_shapes[pair.teacher]),
                _map(rival.method, "student", student_shapes[pair.student]),
            )
            for pair in rival.maps
        ]
        if cache.codes:
            for pair in rival.vectors:
                _check_codec(rival.method, teacher_shapes[pair.teacher], False, cache)
            for pair in rival.maps:
                _check_codec(rival.method, teacher_shapes[pair.teacher], True, cache)
            if RIVALS[rival.method].logits and parse_logits(cache.logits).top:
                raise UserError(
                    f"loss.name has {rival.method}, which reads all of the teacher's logits, and cache.logits is "
                    f"{cache.logits}: pass --cache.logits fp16"
                )
        plans.append(RivalPlan(rival.method, RivalTaps(tuple(vectors), tuple(maps))))
    return tuple(plans)


def _vector(shape: TapShape) -> Side:
    return Side(shape.name, shape.channels)


def _map(method: Method, who: str, shape: TapShape) -> Side:
    if shape.kind == "vector":
        raise UserError(
            f"loss.name has {method}, which reads maps, and {who} layer {shape.name!r} of loss.rival_pairs gives a "
            f"vector of {shape.channels}: name an earlier layer (`python -m mimkd_ray layers` lists them)"
        )
    return Side(shape.name, shape.channels, shape.height, shape.width)


def _check_codec(method: Method, shape: TapShape, is_map: bool, cache: CacheConfig) -> None:
    entry = tap_entry(shape.name, shape, is_map, cache)
    left = coded_shape(entry.spec, entry.shape)
    if left != entry.shape:
        whole, rest = ("x".join(str(size) for size in each if size) for each in (entry.shape, left))
        raise UserError(
            f"loss.name has {method}, which reads the teacher's {entry.label} whole ({whole}), and its codec "
            f"{entry.spec} leaves {rest} of it: give it one that does not pool or take components, such as "
            f"--cache.codecs {'maps' if is_map else 'vectors'}=fp16"
        )
