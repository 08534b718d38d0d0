"""Training from a cache: the same as with a live teacher, up to the codec's rounding; and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tiny_cache import STEPS, build_here, cached_config, live, walk
from tiny_run import cpu

from mimkd_ray import storage
from mimkd_ray.cli.preflight import preflight
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.losses.features import Features
from mimkd_ray.train.engine.student import lone_student
from mimkd_ray.train.job import run_job
from mimkd_ray.train.networks.build import build_network


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def worst_difference(ours: list[Features], theirs: list[Features]) -> float:
    """Largest relative difference of any feature of any lane."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        assert a.vectors.keys() == b.vectors.keys()
        assert a.maps.keys() == b.maps.keys()
        pairs = [(a.logits_BC, b.logits_BC)]
        pairs += [(a.vectors[tap], b.vectors[tap]) for tap in a.vectors] + [(a.maps[t], b.maps[t]) for t in a.maps]
        for ours_B, theirs_B in pairs:
            assert ours_B.shape == theirs_B.shape
            worst = max(worst, relative(ours_B, theirs_B))
    return worst


CODECS = {
    "fp32": (("maps=fp32", "vectors=fp32"), 1e-5, 1e-5),
    "fp16": (("maps=fp16", "vectors=fp16"), 1e-3, 1e-3),
    "pca": (("maps=pool4,pca8,fp32", "vectors=pca8,fp32"), 1e-5, 1e-5),
    "uint8": (("maps=pool4,pca8,uint8", "vectors=fp16"), 0.03, 0.03),
}
"""Codecs, and the relative errors that they allow of features (and loss), and of the gradient."""


@pytest.mark.parametrize(
    ("name", "pipeline"), [*((name, "digits") for name in CODECS), ("fp32", "none"), ("uint8", "none")]
)
def test_cached_is_live_up_to_rounding(tmp_path: Path, name: str, pipeline: str) -> None:
    """The same samples and views; features, first loss and first gradient as near as the codec rounds."""
    codecs, tolerance, of_gradient = CODECS[name]
    kd = 0.0 if name in ("fp32", "pca") else 0.5  # logits are fp16 whatever the codec
    config = cached_config(
        tmp_path / "cache",
        cache={"codecs": codecs, "calibration_rows": 600},
        data={"pipeline": pipeline},
        loss={"kd_weight": kd},
    )
    build_here(config)
    ours, theirs = walk(config, tmp_path / "a"), walk(live(config), tmp_path / "b")
    assert ours["samples"] == theirs["samples"]
    assert {view for _, view, _ in ours["samples"]} == {0, 1}, "both views"
    if not kd:
        assert not ours["features"][0].logits_BC.numel(), "logits that nobody uses are not read"
        for seen in (ours, theirs):
            seen["features"] = [f._replace(logits_BC=torch.ones(1)) for f in seen["features"]]
    found = worst_difference(ours["features"], theirs["features"])
    assert found < tolerance
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], rel=tolerance)
    assert relative(ours["gradient"], theirs["gradient"]) < of_gradient
    if name == "uint8":
        assert found > 1e-4, "uint8 does round"


@pytest.mark.parametrize("brought", [{"classes": "names.txt"}, {"image_size": 12, "std": (0.2, 0.3, 0.4)}, {}])
def test_what_people_bring_is_the_same_cached_and_live(tmp_path: Path, brought: dict[str, Any]) -> None:
    """Classes of its own, of which four are the data's: a cache has all of its logits. Its own images. No labels."""
    (tmp_path / "names.txt").write_text("zero\n3\nseven\n5\n1\n12\n8\n")
    own = brought | ({"classes": f"{tmp_path}/names.txt"} if "classes" in brought else {})
    fields = {"teacher": own, "data": {"labels": "all" if own else "none"}}
    config = cached_config(tmp_path / "cache", **fields, cache={"codecs": ("maps=fp32", "vectors=fp32")})
    build_here(config)
    preflight(config)
    ours, theirs = walk(config, tmp_path / "a"), walk(live(config), tmp_path / "b")
    assert ours["features"][0].logits_BC.shape[1] == (7 if "classes" in brought else 10)
    assert worst_difference(ours["features"], theirs["features"]) < 1e-3, "logits are fp16"
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3)


def test_a_queue_is_the_same_cached_and_live(tmp_path: Path) -> None:
    """Every step of the run, with negatives of the steps before: losses as near as fp16 features are."""
    config = cached_config(
        tmp_path / "cache",
        cache={"codecs": ("maps=fp16", "vectors=fp16")},
        loss={"preset": "best", "queue": 60, "kd_weight": 0.5},
    )
    build_here(config)
    ours, theirs = walk(config, tmp_path / "a"), walk(live(config), tmp_path / "b")
    assert ours["samples"] == theirs["samples"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=2e-3)
    ceiling = float(ours["log"]["global/pool-pool/ceiling"])
    assert ceiling == float(theirs["log"]["global/pool-pool/ceiling"]) > 3, "more candidates than a lane of 10 has"


def test_top_logits_are_live_up_to_rounding(tmp_path: Path) -> None:
    """Every step of the run, cached, live beside the cache and without one; all logits are another loss."""
    exact = ("maps=fp32", "vectors=fp32")
    config = cached_config(tmp_path / "cache", cache={"logits": "top3", "codecs": exact}, loss={"kd_weight": 1.0})
    build_here(config)
    ours, theirs = walk(config, tmp_path / "a"), walk(live(config), tmp_path / "b")
    assert ours["samples"] == theirs["samples"]
    logits = [(a.logits_BC, b.logits_BC) for a, b in zip(ours["features"], theirs["features"], strict=True)]
    assert all(b.sort(1).values[:, :7].std(1).max() < 1e-5 for _, b in logits), "seven of ten are equal"
    assert 0 < max(relative(a, b) for a, b in logits) < 1e-3
    assert float(ours["log"]["kd"]) == pytest.approx(float(theirs["log"]["kd"]), rel=1e-3)
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3)
    assert relative(ours["gradient"], theirs["gradient"]) < 1e-3
    alone = replace(config, cache=replace(config.cache, root=""))
    assert walk(alone, tmp_path / "c")["losses"] == theirs["losses"]
    whole = walk(live(replace(config, cache=replace(config.cache, logits="fp16"))), tmp_path / "d")
    assert float(whole["log"]["kd"]) != pytest.approx(float(theirs["log"]["kd"]), rel=0.01)


def test_the_teacher_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = cached_config(tmp_path / "cache", cache={"canary": 0.0})
    build_here(config)

    def features(*_: Any) -> Features:
        raise AssertionError("the teacher ran")

    monkeypatch.setattr("mimkd_ray.train.networks.teacher.Teacher.features", features)
    assert len(walk(config, tmp_path / "run")["losses"]) == STEPS


def test_a_held_out_share_reads_the_same_cache(tmp_path: Path) -> None:
    """A search holds rows out, and the run that follows does not: the teacher has run once for both. Its loader
    processes know the rows that are left."""
    whole = cached_config(tmp_path / "cache", cache={"codecs": ("maps=fp32", "vectors=fp32"), "batch": 64})
    keys = build_here(whole).keys
    part = replace(whole, data=replace(whole.data, subset=0, holdout=0.9, loader_workers=2))
    whole_of_part = replace(part, data=replace(part.data, holdout=0.0))
    assert build_here(part).keys == build_here(whole_of_part).keys != keys
    in_process = replace(part, data=replace(part.data, loader_workers=0))
    cached, at_work = walk(part, tmp_path / "a"), walk(live(in_process), tmp_path / "b")
    assert cached["samples"] == at_work["samples"]
    assert worst_difference(cached["features"], at_work["features"]) < 1e-3  # logits are fp16


def test_a_run_of_one_tap_reads_one_tap_of_four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that the storage gave out, by entry: those of the one tap, each once, and nothing of the other three, of
    the logits and of the pixels."""
    folder, taps = tmp_path / "cache", ("stage1", "stage2")
    off = {"canary": 0.0, "taps": taps}
    config = cached_config(folder, cache=off, data={"store": str(tmp_path / "store")}, loss={"kd_weight": 0.0})
    built = build_here(config)
    assert {"pool:vector", "stage1:map", "stage2:map", "stage3:map"} < built.keys.keys()
    given: dict[str, int] = {}
    real = storage.read_range

    def read_range(url: str, offset: int, length: int) -> bytes:
        data = real(url, offset, length)
        key = Path(url).relative_to(folder).parts[0]
        given[key] = given.get(key, 0) + len(data)
        return data

    monkeypatch.setattr(storage, "read_range", read_range)
    one = replace(config.loss, global_weight=0.0, local_weight=0.0)
    walk(replace(config, loss=one), tmp_path / "run")
    used = built.keys["stage3:map"]
    assert given.keys() == {used}
    files = (folder / used).rglob("*.parquet")
    groups = [pq.ParquetFile(file).metadata for file in files]
    sizes = [g.row_group(n).total_byte_size for g in groups for n in range(g.num_row_groups)]
    assert given[used] == sum(sizes)


def test_loader_processes_bring_the_same_features(tmp_path: Path) -> None:
    """Two loader processes, shared slots, read-ahead into a store, from digits that have none of their own."""
    config = cached_config(tmp_path / "cache", data={"store": str(tmp_path / "store")})
    build_here(config)
    plain = walk(config, tmp_path / "run")
    processes = walk(replace(config, data=replace(config.data, loader_workers=2)), tmp_path / "run")
    assert worst_difference(processes["features"], plain["features"]) == 0
    assert processes["losses"] == plain["losses"]
    assert list((tmp_path / "store").glob("*")), "features went through the store"


def test_a_live_run_with_codecs_fits_its_own(tmp_path: Path) -> None:
    """Without a cache: calibrated in the run's directory, once, and equal to a cache's."""
    codecs = ("maps=pool4,pca8,uint8",)
    config = cached_config(tmp_path / "cache", cache={"codecs": codecs})
    build_here(config)
    alone = replace(config, cache=replace(config.cache, root=""))
    first = walk(alone, tmp_path / "run")
    (made,) = (tmp_path / "run" / "calibrations").glob("*")
    (shared,) = (tmp_path / "cache" / "calibrations").glob("*")
    assert made.read_bytes() == shared.read_bytes()
    written = made.stat().st_mtime_ns
    assert walk(alone, tmp_path / "run")["losses"] == first["losses"]
    assert made.stat().st_mtime_ns == written
    assert first["losses"] == walk(live(config), tmp_path / "other")["losses"]


def test_a_whole_job(tmp_path: Path) -> None:
    """With evaluation, which reads mutual information from the live teacher, and resumed by its result."""
    config = cached_config(tmp_path / "cache")
    build_here(config)
    result = run_job(config, cpu(), str(tmp_path / "run"))
    assert result["steps"] == 6
    assert result["nats"]["feature/stage3-stage3"]["nats"] is not None
    assert run_job(config, cpu(), str(tmp_path / "run")) == result


def test_seeds_of_a_comparison_share_one_cache(tmp_path: Path) -> None:
    config = cached_config(
        tmp_path / "cache",
        data={"holdout": 0.9, "subset": 0},
        compare={"seeds": 2, "arms": ("alone", "mimkd")},
        train={"epochs": 1, "lane_batch": 20},
        cache={"shard_rows": 100},
    )
    build_here(config)
    result = run_job(config, cpu(), str(tmp_path / "run"))
    assert len(result["compare"]["mimkd"]["top1"]) == 2


def test_the_canary_looks_and_finds_nothing(tmp_path: Path) -> None:
    """The first lane, one keyed lane of six in each epoch, and no more."""
    config = cached_config(tmp_path / "cache", cache={"calibration_rows": 600})
    build_here(config)
    data = open_data(config.data)
    network = build_network(config, data.num_classes, config.teacher.weights)
    student = lone_student(config, data, network, cpu(), str(tmp_path / "run"))
    check = student.inputs.check
    student.inputs.start(0)
    for step in range(student.total_steps):
        student.step(step)
    assert 2 <= check.looked <= 3
    assert set(check.relative) == {"pool:vector", "stage3:map", "logits"}
    assert 0 < check.relative["stage3:map"] < 0.02


def test_a_set_on_the_device_brings_the_same_features(tmp_path: Path) -> None:
    config = cached_config(tmp_path / "cache")
    build_here(config)
    plain = walk(config, tmp_path / "run")
    resident = walk(replace(config, data=replace(config.data, resident="on")), tmp_path / "run")
    assert worst_difference(resident["features"], plain["features"]) == 0
    assert resident["samples"] == plain["samples"]
    assert resident["losses"] == plain["losses"]
