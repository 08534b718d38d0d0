"""Every rival through the trainer: alone and in a pack that was cut and resumed, with a live teacher and a cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_cache import build_here, cached_config, live
from tiny_run import cpu, tiny_config, wait_for_checkpoints

from mimkd_ray.config import Config
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.errors import UserError
from mimkd_ray.losses.methods.registry import RIVALS, Method
from mimkd_ray.train.engine.student import Student, lone_student
from mimkd_ray.train.loop import train
from mimkd_ray.train.networks.build import build_network
from mimkd_ray.train.packed import Member, train_pack
from mimkd_ray.train.records.outcomes import Finished

METHODS: list[tuple[Method, ...]] = [*((method,) for method in RIVALS), ("mimkd", "crd", "review")]
IDS = ["+".join(name) for name in METHODS]
TRAIN: dict[str, Any] = {"epochs": 3, "lanes": 1, "lane_batch": 20}
EPOCH = 3
"""Steps of an epoch."""


def configs(base: Config) -> list[Config]:
    """One for each method, in the weights of its publication; warm-up ends in the second of three epochs."""
    return [replace(base, loss=replace(base.loss, name=name, rival_warmup=2.0)) for name in METHODS]


def log(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Its metrics, without those of the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("images_per_second", "data_wait", "cache_hit_rate")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines if line["kind"] == kind]


def run(config: Config, folder: Path) -> dict[str, Any]:
    data = open_data(config.data)
    network = build_network(config, data.num_classes, "random")
    return train(config, data, network, cpu(), str(folder), quiet=True)


def together(own: Sequence[Config], root: Path) -> list[dict[str, Any]]:
    """Train all in one pack; return their results."""
    members = [Member(config, str(root / name)) for config, name in zip(own, IDS, strict=True)]
    data = open_data(own[0].data)
    outcomes = train_pack(members, data, build_network(own[0], data.num_classes, "random"), cpu())
    return [outcome.result for outcome in outcomes if isinstance(outcome, Finished)]


class _StopError(Exception):
    pass


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them in one pack, with a live teacher, cut in the second epoch and resumed."""
    root = tmp_path_factory.mktemp("pack")
    real = Student.schedule

    def dies_in_the_second_epoch(self: Student, step: int) -> None:
        if step == EPOCH + 2:
            raise _StopError
        real(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Student, "schedule", dies_in_the_second_epoch)
        with pytest.raises(_StopError):
            together(_live(), root)
    wait_for_checkpoints()
    assert [result["resumed_from"] for result in together(_live(), root)] == [EPOCH] * len(METHODS)
    return root


def _live() -> list[Config]:
    return configs(tiny_config(data={"holdout": 0.95, "subset": 0, "val_rows": 60}, train=TRAIN))


@pytest.mark.parametrize("number", range(len(METHODS)), ids=IDS)
def test_the_member_of_a_pack_that_was_cut_is_a_whole_lone_run_bit_for_bit(
    pack: Path, tmp_path: Path, number: int
) -> None:
    cut = pack / IDS[number]
    assert run(_live()[number], tmp_path)["steps"] == 3 * EPOCH
    ours, theirs = load_file(tmp_path / "student.safetensors"), load_file(cut / "student.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert log(tmp_path, "train") == log(cut, "train")
    assert log(tmp_path, "eval") == log(cut, "eval")
    for method in METHODS[number]:
        if method not in ("mimkd", "kd"):
            assert all(line[f"rival/{method}"] > 0 for line in log(cut, "train"))


def test_they_differ_from_each_other(pack: Path) -> None:
    last = {name: log(pack / name, "train")[-1]["ce"] for name in IDS}
    assert len(set(last.values())) == len(IDS)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A cache of all that any of them reads, in float32."""
    base = cached_config(
        tmp_path_factory.mktemp("cache"),
        data={"val_rows": 60},
        train={**TRAIN, "epochs": 1},
        cache={"codecs": ("maps=fp32", "vectors=fp32"), "logits": "fp32"},
        loss={"kd_weight": 0},
    )
    build_here(replace(base, loss=replace(base.loss, name=("mimkd", *RIVALS))))
    return base


def test_cached_is_live(cached: Config, tmp_path: Path) -> None:
    for name, base in (("cached", cached), ("live", live(cached))):
        together(configs(base), tmp_path / name)
    for method in IDS:
        ours, theirs = (log(tmp_path / name / method, "train") for name in ("cached", "live"))
        assert len(ours) == 3
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.keys() == other.keys()
            for key, value in other.items():
                if key != "kind":
                    assert mine[key] == pytest.approx(value, rel=1e-3, abs=1e-6), (method, key)


def test_lanes_share_batch_norms_of_regressors(tmp_path: Path) -> None:
    """Two lanes, and a critic beside: every statistic of a rival's layer has moved, and stayed finite."""
    config = tiny_config(loss={"name": ("mimkd", "fitnet", "review", "vid")})
    data = open_data(config.data)
    student = lone_student(config, data, build_network(config, data.num_classes, "random"), cpu())
    student.inputs.start(0)
    record = student.step(0)
    assert all(value.isfinite() for value in record.log.values())
    norms = [m for m in student.distiller.loss.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 1 + 2 * 4
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_mean.abs().sum() > 0
        assert int(norm.num_batches_tracked) == 1


def test_no_rival_is_exported(pack: Path) -> None:
    alone = load_file(pack / "kd" / "student.safetensors")
    for name in IDS:
        assert load_file(pack / name / "student.safetensors").keys() == alone.keys()


def test_dkd_of_one_class_is_refused(tmp_path: Path) -> None:
    base = tiny_config(train=TRAIN)
    data = replace(open_data(base.data), num_classes=1)
    network = build_network(base, 1, "random")
    with pytest.raises(UserError, match=r"loss\.name has dkd.* 1 class"):
        train(replace(base, loss=replace(base.loss, name=("dkd",))), data, network, cpu(), str(tmp_path), quiet=True)
