from __future__ import annotations

import re

import pytest

from mimkd_ray.config import LossConfig
from mimkd_ray.errors import UserError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.taps.default_stages import Stages
from mimkd_ray.taps.pairing import Pair, choose_pairs, parse_pair
from mimkd_ray.taps.tapped_model import TapShape
from mimkd_ray.train.networks.build import plan_taps


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("layer4:stage3", Pair("layer4", "stage3")),
        ("features.3.0:layer4:0.25", Pair("features.3.0", "layer4", 0.25)),
        ("a:b:1e-2", Pair("a", "b", 0.01)),
        ("stage3.0.relu@input:layer4@input", Pair("stage3.0.relu@input", "layer4@input")),
        ("stage3.0.relu@input:stage3.0.relu@input:0.5", Pair("stage3.0.relu@input", "stage3.0.relu@input", 0.5)),
    ],
)
def test_parse(text: str, pair: Pair) -> None:
    assert parse_pair(text) == pair


@pytest.mark.parametrize("text", ["layer4", "a:", ":b", "a:b:c", "a:b:1:2", "a:b:-1", "a:b:nan", ""])
def test_malformed_pairs_are_named(text: str) -> None:
    with pytest.raises(UserError, match="is not 'teacher_layer:student_layer'"):
        parse_pair(text)


def _shape(name: str, side: int) -> TapShape:
    return TapShape(name, "map", 8, side, side)


def test_chosen_stages_pair_from_the_deepest_and_leave_out_large_maps() -> None:
    teacher = Stages(("t1", "t2", "t3", "t4"), "tv")
    student = Stages(("s1", "s2", "s3"), "sv")
    shapes = {"s1": _shape("s1", 28), "s2": _shape("s2", 14), "s3": _shape("s3", 7)}
    assert choose_pairs("feature", teacher, student, shapes, 14) == [Pair("t3", "s2"), Pair("t4", "s3")]
    assert choose_pairs("local", teacher, student, shapes, 14) == [Pair("tv", "s3")]
    assert choose_pairs("global", teacher, student, shapes, 14) == [Pair("tv", "sv")]


def test_of_large_maps_alone_the_deepest_pairs() -> None:
    """Vision transformers of patch 14 have 16x16 places at 224 px in all blocks."""
    student = Stages(("s1", "s2"), "sv")
    shapes = {"s1": _shape("s1", 16), "s2": _shape("s2", 16)}
    assert choose_pairs("feature", Stages(("t1", "t2"), "tv"), student, shapes, 14) == [Pair("t2", "s2")]
    assert choose_pairs("local", Stages(("t1", "t2"), "tv"), student, shapes, 14) == [Pair("tv", "s2")]


def test_nothing_to_pair_names_the_remedy() -> None:
    stages = Stages(("s1",), "sv")
    with pytest.raises(UserError, match=r"--loss\.feature-pairs .* or pass --loss\.feature-weight 0"):
        choose_pairs("feature", stages, Stages((), "sv"), {"s1": _shape("s1", 32)}, 14)


def test_plan_of_two_real_networks() -> None:
    teacher, student = build_model("cifar/resnet32x4", 10), build_model("cifar/resnet8x4", 10)
    plan = plan_taps(LossConfig(preset="two_sided", local_weight=0.0), teacher, student, 32)
    assert [term.name for term in plan.terms] == ["global/pool-pool", "feature/stage3-stage3"]
    assert [(term.teacher_channels, term.student_channels) for term in plan.terms] == [(256, 256), (256, 256)]
    assert plan.teacher_taps() == (["pool"], ["stage3"])


def test_a_pairs_factor_multiplies_the_kinds_weight() -> None:
    teacher, student = build_model("cifar/resnet20", 10), build_model("cifar/resnet8", 10)
    config = LossConfig(global_weight=0, local_weight=0, feature_weight=0.5, feature_pairs=("stage2:stage3:0.2",))
    (term,) = plan_taps(config, teacher, student, 32).terms
    assert term.weight == pytest.approx(0.1)
    assert (term.teacher_channels, term.student_channels) == (32, 64)


def test_chosen_stages_can_be_read_before_their_activation() -> None:
    teacher, student = build_model("cifar/resnet20", 10), build_model("cifar/resnet8", 10)
    (term,) = plan_taps(LossConfig(global_weight=0, taps="before", max_side=8), teacher, student, 32).terms
    assert (term.teacher, term.student) == ("stage3.2.relu@input", "stage3.0.relu@input")
    wide = plan_taps(LossConfig(global_weight=0, max_side=16, pair_weights="shared"), teacher, student, 32)
    assert [(term.student, term.weight) for term in wide.terms] == [("stage2", 1.5), ("stage3", 1.5)]


def test_logits_are_a_tap_without_a_layer() -> None:
    teacher, student = build_model("cifar/resnet20", 10), build_model("cifar/resnet8", 10)
    config = LossConfig(feature_weight=0, global_pairs=("pool:pool", "logits:logits:0.5"))
    plan = plan_taps(config, teacher, student, 32)
    assert [(t.teacher, t.teacher_channels, t.student_channels) for t in plan.terms] == [
        ("pool", 64, 64),
        ("logits", 10, 10),
    ]
    assert plan.teacher_taps() == (["pool"], [])
    assert plan.student_taps() == (["pool"], [])
    assert config.uses_logits
    assert not LossConfig().uses_logits


def test_pairs_of_inputs() -> None:
    teacher, student = build_model("cifar/resnet20", 10), build_model("resnet18", 10)
    pairs = ("stage3.2.relu@input:layer2.1.relu@input:0.5", "stage3.2.relu:layer2")
    config = LossConfig(global_weight=0, local_weight=0, feature_weight=0.5, feature_pairs=pairs)
    plan = plan_taps(config, teacher, student, 32)
    assert [(term.teacher, term.student, term.weight) for term in plan.terms] == [
        ("stage3.2.relu@input", "layer2.1.relu@input", 0.25),
        ("stage3.2.relu", "layer2", 0.5),
    ]
    assert [(term.teacher_channels, term.student_channels) for term in plan.terms] == [(64, 128), (64, 128)]
    assert plan.student_taps() == ([], ["layer2.1.relu@input", "layer2"])
    # MLflow takes letters, digits, "_", "-", ".", " ", ":" and "/" in a metric's name, and TensorBoard fewer.
    assert plan.terms[0].name == "feature/stage3.2.relu.input-layer2.1.relu.input"
    assert all(re.fullmatch(r"[-/\w.]+", term.name) for term in plan.terms)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"feature_pairs": ("pool:stage3",)}, "needs a map, and teacher layer 'pool' gives a vector of 64"),
        (
            {"local_pairs": ("pool:pool",), "local_weight": 0.1},
            "needs a map, and student layer 'pool' gives a vector of 64",
        ),
        ({"feature_pairs": ("stage9:stage3",)}, "'stage9' not found"),
        ({"feature_pairs": ("stage3:stag3@input",)}, "'stag3' not found"),
        ({"feature_pairs": ("head@input:stage3",)}, "needs a map, and teacher layer 'head@input' gives a vector of 64"),
    ],
)
def test_impossible_layers_are_named(pairs: dict, message: str) -> None:
    teacher, student = build_model("cifar/resnet20", 10), build_model("cifar/resnet8", 10)
    with pytest.raises(UserError, match=message):
        plan_taps(LossConfig(**pairs), teacher, student, 32)
