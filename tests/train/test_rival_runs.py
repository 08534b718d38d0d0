"""Every rival through the trainer: in a pack and alone, cut and resumed, with a live teacher and with a cache."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_cache import build_here, cached_config
from tiny_run import cpu, tiny_config

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
TRAIN: dict[str, Any] = {"epochs": 3, "lanes": 1, "lane_batch": 20, "information_rows": 30}


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


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them in one pack, with a live teacher."""
    root = tmp_path_factory.mktemp("pack")
    members = [Member(config, str(root / name)) for config, name in zip(_live(), IDS, strict=True)]
    data = open_data(members[0].config.data)
    outcomes = train_pack(members, data, build_network(members[0].config, data.num_classes, "random"), cpu())
    assert [type(outcome) for outcome in outcomes] == [Finished] * len(METHODS)
    return root


def _live() -> list[Config]:
    return configs(tiny_config(data={"holdout": 0.9, "subset": 0}, train=TRAIN))


class _StopError(Exception):
    pass


@pytest.mark.parametrize("number", range(len(METHODS)), ids=IDS)
def test_a_run_that_was_cut_is_the_pack_member_bit_for_bit(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    config, whole = _live()[number], pack / IDS[number]
    evaluate = Student.evaluate

    def dies_in_the_second_evaluation(self: Student) -> dict[str, Any]:
        if len(log(tmp_path, "eval")) == 1:
            while not list((tmp_path / "checkpoints").glob("*/committed.json")):  # written beside the training
                time.sleep(0.01)
            raise _StopError
        return evaluate(self)

    monkeypatch.setattr(Student, "evaluate", dies_in_the_second_evaluation)
    with pytest.raises(_StopError):
        run(config, tmp_path)
    monkeypatch.undo()
    result = run(config, tmp_path)
    assert result["resumed_from"] == result["steps"] // 3
    ours, theirs = load_file(tmp_path / "student.safetensors"), load_file(whole / "student.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert log(tmp_path, "train") == log(whole, "train")
    assert log(tmp_path, "eval") == log(whole, "eval")
    for method in METHODS[number]:
        if method not in ("mimkd", "kd"):
            assert all(line[f"rival/{method}"] > 0 for line in log(whole, "train"))


def test_they_differ_from_each_other(pack: Path) -> None:
    last = {name: log(pack / name, "train")[-1]["ce"] for name in IDS}
    assert len(set(last.values())) == len(IDS)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A cache of all that any of them reads, in float32."""
    base = cached_config(
        tmp_path_factory.mktemp("cache"),
        train={**TRAIN, "epochs": 1},
        cache={"codecs": ("maps=fp32", "vectors=fp32"), "logits": "fp32"},
        loss={"kd_weight": 0},
    )
    build_here(replace(base, loss=replace(base.loss, name=("mimkd", *RIVALS))))
    return base


@pytest.mark.parametrize("number", range(len(METHODS)), ids=IDS)
def test_cached_is_live(cached: Config, tmp_path: Path, number: int) -> None:
    config = configs(cached)[number]
    run(config, tmp_path / "cached")
    run(replace(config, cache=replace(config.cache, live=True)), tmp_path / "live")
    ours, theirs = log(tmp_path / "cached", "train"), log(tmp_path / "live", "train")
    assert len(ours) == 3
    for mine, live in zip(ours, theirs, strict=True):
        assert mine.keys() == live.keys()
        for key, value in live.items():
            if key != "kind":
                assert mine[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key


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
