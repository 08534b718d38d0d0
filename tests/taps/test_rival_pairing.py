"""The taps that rivals read, and the errors before anything starts."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from tiny_run import tiny_config
from torch import nn

from mimkd_ray.cli.preflight import preflight
from mimkd_ray.config import CacheConfig, LossConfig
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.data.sources.source import SubsetSource, ids_of
from mimkd_ray.errors import UserError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.taps.default_stages import Stages
from mimkd_ray.taps.rival_pairing import pair_rivals
from mimkd_ray.train.networks.build import TapPlan, plan_taps, training_rows


@functools.cache
def networks() -> tuple[nn.Module, nn.Module]:
    return build_model("cifar/resnet50", 10), build_model("cifar/shufflenet_v2", 10)


def plan(*name: str, cache: CacheConfig | None = None, **fields) -> TapPlan:
    return plan_taps(LossConfig(name=name, preset="two_sided", **fields), *networks(), 32, cache or CacheConfig())


def maps_of(found: TapPlan) -> list[list[tuple]]:
    return [[(pair.teacher.tap, pair.student.tap) for pair in rival.taps.maps] for rival in found.rivals]


def test_stages_pair_from_the_deepest_and_each_rival_takes_its_own() -> None:
    """Four stages of ResNet-50, three of ShuffleNetV2."""
    found = plan("fitnet", "at", "sp", "rkd", "dist", "review")
    stages = [("stage2", "stage1"), ("stage3", "stage2"), ("stage4", "stage3")]
    assert [rival.method for rival in found.rivals] == ["fitnet", "at", "sp", "rkd", "dist", "review"]
    assert maps_of(found) == [[stages[1]], stages, [stages[2]], [], [], stages]
    assert [len(rival.taps.vectors) for rival in found.rivals] == [0, 0, 0, 1, 0, 1]
    assert found.teacher_taps() == (["pool"], ["stage3", "stage2", "stage4"])
    assert found.student_taps() == (["pool"], ["stage2", "stage1", "stage3"])
    assert found.terms == ()
    (pair,) = found.rivals[0].taps.maps
    assert (pair.teacher[1:], pair.student[1:]) == ((1024, 8, 8), (232, 8, 8))
    (vectors,) = found.rivals[3].taps.vectors
    assert (vectors.teacher.channels, vectors.student.channels) == (2048, 1024)


def test_beside_mimkd_every_tap_is_named_once() -> None:
    found = plan("mimkd", "sp", "pkt")
    assert [term.kind for term in found.terms] == ["global", "local", "feature", "feature"]
    assert found.teacher_taps() == (["pool"], ["stage3", "stage4"])
    assert found.student_taps() == (["pool"], ["stage3", "stage2"])


def test_logits_need_no_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimkd_ray.train.networks.build.default_taps", lambda *_: pytest.fail("stages were looked for"))
    found = plan("dkd", "dist")
    assert [rival.method for rival in found.rivals] == ["dkd", "dist"]
    assert found.teacher_taps() == found.student_taps() == ([], [])
    assert plan("kd") == TapPlan()


def test_configured_pairs_are_for_all_rivals_of_maps() -> None:
    found = plan("fitnet", "sp", "cc", rival_pairs=("stage2:stage1", "stage4:stage3"))
    both = [("stage2", "stage1"), ("stage4", "stage3")]
    assert maps_of(found) == [both, both, []]


def test_of_a_single_stage_the_second_is_that_one() -> None:
    stages = Stages(("a",), "v")
    (fitnet,) = pair_rivals(LossConfig(name=("fitnet",)), stages, stages)
    assert [(pair.teacher, pair.student) for pair in fitnet.maps] == [("a", "a")]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (("pool:stage3",), "loss.name has sp, which reads maps, and teacher layer 'pool' of loss.rival_pairs gives a"),
        (("stage4:pool",), "student layer 'pool' of loss.rival_pairs gives a vector of 1024"),
        (("stage4:stage3:0.5",), "rivals have one weight for all their pairs"),
        (("stage9:stage3",), "'stage9' not found"),
    ],
)
def test_impossible_pairs_are_named(pairs: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan("sp", rival_pairs=pairs)


@pytest.mark.parametrize(
    ("name", "cache", "message"),
    [
        (
            "at",
            CacheConfig(root="somewhere"),
            r"loss.name has at, which reads the teacher's stage2:map whole \(512x16x16\), and its codec "
            r"pool4,pca256,uint8 leaves 256x4x4 of it: .*--cache.codecs maps=fp16",
        ),
        ("sp", CacheConfig(codecs=("stage4=pca8,fp16",)), r"stage4:map whole \(2048x4x4\).* leaves 8x4x4"),
        ("crd", CacheConfig(codecs=("vectors=pca64,fp16",)), r"whole \(2048\).*leaves 64 of it.* vectors=fp16"),
        ("dkd", CacheConfig(logits="top3"), r"loss.name has dkd, which reads all.*cache.logits is top3"),
    ],
)
def test_codecs_that_leave_less_are_refused(name: str, cache: CacheConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(name, cache=cache)


def test_codecs_that_only_round_are_taken() -> None:
    for codecs in (("maps=fp16",), ("maps=uint8", "vectors=uint8"), ("maps=pool32,pca4096,fp16",)):
        assert plan("at", "fitnet", "review", cache=CacheConfig(root="somewhere", codecs=codecs)).rivals
    assert plan("rkd", "dist", cache=CacheConfig(root="somewhere")).rivals
    assert plan("mimkd", "dist", cache=CacheConfig(root="somewhere")).rivals, "MIMKD's maps may be pooled"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loss": {"name": ("crd",)}}, "train.lanes is 2: pass --train.lanes 1 --train.lane-batch 20"),
        (
            {"loss": {"name": ("dkd",)}, "mix": {"mixup_alpha": 0.2}},
            "loss.name has dkd, for images of one class, and mix.mixup_alpha",
        ),
        ({"compare": {"seeds": 1, "arms": ("alone", "crd")}}, "train.lanes is 2"),
        (
            {"compare": {"seeds": 1, "arms": ("alone", "sp")}, "cache": {"codecs": ("stage3=pool1,fp32",)}},
            "loss.name has sp, which reads the teacher's stage3:map whole",
        ),
    ],
)
def test_refused_before_workers_start(sections: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        preflight(tiny_config(**sections))


def test_mixing_goes_with_rivals_that_read_no_class(tmp_path: Path) -> None:
    preflight(tiny_config(loss={"name": ("dist", "rkd", "mimkd")}, mix={"mixup_alpha": 0.2}))


def test_training_rows_have_the_ids_of_the_whole() -> None:
    config = tiny_config(loss={"name": ("crd",)}, train={"lanes": 1}, data={"holdout": 0.3, "subset": 0})
    data = open_data(config.data)
    rows = training_rows(config.loss, data.train)
    assert rows is not None
    read = data.train.read(range(data.train.num_rows))
    assert rows.ids_N.tolist() == [row.id for row in read]
    assert rows.labels_N.tolist() == [row.label for row in read]
    assert rows.ids_N.tolist() != list(range(len(read)))
    assert training_rows(LossConfig(name=("rkd",)), data.train) is None
    assert ids_of(SubsetSource(SubsetSource(data.whole, [2, 5, 9]), [0, 2])).tolist() == [2, 9]
    assert np.array_equal(ids_of(data.whole), np.arange(data.whole.num_rows))
