"""Taps of a layer's input in the teacher cache, local and on an S3 server."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_cached_teacher import live, relative, walk, worst_difference
from tiny_cache import build_here, cached_config, files

from mimkd_ray import storage
from mimkd_ray.cli.preflight import preflight
from mimkd_ray.data.store import block_reader
from mimkd_ray.errors import UserError
from mimkd_ray.teacher_cache import admin
from mimkd_ray.teacher_cache.keys import read_keys

TAP, OTHER = "stage3.0.relu@input", "stage2.0.relu@input"
LOSS = {
    "kd_weight": 0.0,
    "global_weight": 0.0,
    "local_weight": 0.0,
    "feature_weight": 1.0,
    "feature_pairs": (f"{TAP}:{TAP}:0.5",),
}
EXACT = ("maps=fp32", "vectors=fp32", f"{OTHER}:vector=pca4,fp32")


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_reader, "_blocks", block_reader._KeptBlocks())


def test_cached_inputs_are_live_ones(tmp_path: Path) -> None:
    """Features, loss and gradient; names are in key.json alone, and no path has a character of them."""
    taps = (f"{OTHER}:map", f"{OTHER}:vector")
    config = cached_config(tmp_path / "cache", loss=LOSS, cache={"codecs": EXACT, "taps": taps})
    built = build_here(config)
    assert list(built.keys) == [f"{OTHER}:vector", f"{TAP}:map", f"{OTHER}:map", "logits", "pixels"]
    assert not any("@" in name for name in files(tmp_path / "cache"))
    assert {parts["tap"] for parts in read_keys(str(tmp_path / "cache")).values()} == {TAP, OTHER, "logits", "pixels"}
    preflight(config)
    ours, theirs = walk(config, tmp_path / "a"), walk(live(config), tmp_path / "b")
    for seen in (ours, theirs):
        seen["features"] = [f._replace(logits_BC=torch.ones(1)) for f in seen["features"]]  # nobody reads them
        assert all(list(features.maps) == [TAP] for features in seen["features"])
    assert min(float(features.maps[TAP].min()) for features in ours["features"]) < 0, "before the activation"
    assert worst_difference(ours["features"], theirs["features"]) < 1e-5
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], rel=1e-5)
    assert relative(ours["gradient"], theirs["gradient"]) < 1e-5
    assert "feature/stage3.0.relu.input-stage3.0.relu.input/loss" in ours["log"]


def test_on_an_object_store(bucket: str, tmp_path: Path) -> None:
    here = cached_config(tmp_path / "cache", loss=LOSS, data={"store": str(tmp_path / "store")})
    there = cached_config(f"{bucket}/cache", loss=LOSS, data={"store": str(tmp_path / "store")})
    local, remote = build_here(here), build_here(there)
    assert remote.keys == local.keys
    assert not any("@" in url for url in storage.list_sizes(f"{bucket}/cache/{remote.keys[f'{TAP}:map']}/view-00000"))
    ours, theirs = walk(there, tmp_path / "run"), walk(here, tmp_path / "run")
    assert ours["losses"] == theirs["losses"]
    assert worst_difference(ours["features"], theirs["features"]) == 0
    assert any(f"{TAP} (map" in line for line in admin.ls(f"{bucket}/cache"))


def test_codecs_of_inputs(tmp_path: Path) -> None:
    """A codec of an input that other runs read is none of this run's business; one of no layer is refused."""
    build_here(cached_config(tmp_path / "cache"))
    preflight(cached_config(tmp_path / "cache", cache={"codecs": (f"{OTHER}:map=fp16", f"{TAP}=bf16")}))
    for wrong in ("stge3@input=fp16", "@input=fp16", "stage3@inputs=fp16"):
        with pytest.raises(UserError, match=f"there is no tap '{wrong.partition('=')[0]}'"):
            walk(cached_config(tmp_path / "cache", cache={"codecs": (wrong,)}), tmp_path / "run")
