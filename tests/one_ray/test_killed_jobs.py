"""A cache and a data set whose job was killed with its own Ray, given again in another Ray."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs_here import ROOT, TAKES_LONG, Job, kill, listening, processes, run_and_kill
from PIL import Image
from tiny_cache import files

from mimkd_ray.cache_build.build_cache import build
from mimkd_ray.cache_build.build_setup import Setup
from mimkd_ray.cache_build.build_units import in_process
from mimkd_ray.cli import cache_teacher, command_line, prepare_data
from mimkd_ray.config import Config, PrepareConfig
from mimkd_ray.data.prepare.make_shards import prepare
from mimkd_ray.data.sources.shard_manifest import read_manifest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

# 33 units: eleven shards of three views.
CACHE = (
    *("custom", "--data.views", "3", "--teacher.name", "cifar/resnet8", "--loss.feature-pairs", "stage3:stage3"),
    *("--data.subset", "512", "--cache.shard-rows", "64", "--cache.batch", "16", "--cache.calibration-rows", "200"),
    *("--launch.cpus-per-worker", "1", "--cache.workers", "1"),
)
RECIPES = {"custom": Config}


def folder_of_images(root: Path) -> None:
    """400 images of two classes, one of them damaged."""
    for i in range(400):
        path = root / "train" / ("cat", "dog")[i % 2] / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(coarse).resize((40, 30)).save(out, "JPEG")
        path.write_bytes(out.getvalue())
    (root / "train" / "cat" / "100.jpg").write_bytes(b"no image")


def job(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / name), *arguments]


@TAKES_LONG
def test_killed_builders_and_a_killed_job(joined: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL of a builder, which Ray starts again, then of the whole job; restarted it ends as an undisturbed one."""
    root = tmp_path / "cache"

    def records() -> int:
        return len(list(root.glob("*/view-*/*.json")))

    def builders() -> list[int]:
        return processes(killed.process.pid, "MapWorker")

    killed = Job(job("cache_teacher.py", *CACHE, "--cache.root", str(root)), tmp_path / "killed.log")
    killed.wait_until(lambda: records() >= 8)
    victims = builders()
    assert victims
    assert {address for address, _ in listening(killed.process.pid)} == {"loopback"}
    kill(victims)
    killed.wait_until(lambda: records() >= 40)
    assert set(builders()).isdisjoint(victims), "another builder went on"
    killed.kill()
    there = records()
    assert not (set(root.glob("*/view-00002.manifest.json")))
    assert cache_teacher.main(RECIPES, [*CACHE, "--cache.root", str(root)]) == 0
    said = capsys.readouterr().out
    (title,) = set(re.findall(r"caching features \((\d+) of 33 units to do\)", said))
    assert 0 < int(title) <= 33 - there // 5
    assert re.search(r"  [\d,]+ images in 0:\d\d:\d\d, [\d,]+ MB written", said)
    assert "512 images x 3 views" in said

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = command_line.parse(RECIPES, "custom", [*CACHE, "--cache.root", str(tmp_path / "whole")], "test")
    assert config is not None
    setup = Setup(config, torch.device("cpu"))
    build(setup, in_process(setup))
    torch.set_num_threads(threads)
    # A kill may leave a temporary file of a writer behind.
    (root / "ray.log").unlink()
    clean_up = ["gc", "--cache.root", str(root), "--hours", "0", "--delete", "true"]
    assert cache_teacher.main(RECIPES, clean_up) == 0
    assert files(root) == files(tmp_path / "whole")
    assert cache_teacher.main(RECIPES, ["verify", "--cache.root", str(root)]) == 0
    assert "0 damaged or gone" in capsys.readouterr().out


@TAKES_LONG
def test_a_killed_preparation_goes_on_and_ends_as_an_undisturbed_one(
    joined: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed after the first part of 25. The undisturbed one runs without Ray."""
    source, expected, target = tmp_path / "source", tmp_path / "expected", tmp_path / "set"
    folder_of_images(source)
    manifest = prepare(PrepareConfig(source=str(source), target=str(expected), block_rows=16, shard_rows=32))
    flags = ["--source", str(source), "--target", str(target), "--block-rows", "16", "--shard-rows", "32"]
    work = target / ".prepare-train"
    run_and_kill(job("prepare_data.py", *flags), lambda: any(work.glob("part-*.json")), tmp_path / "killed.log")
    parts = list(work.glob("part-*.json"))
    assert 1 <= len(parts) < 25
    assert read_manifest(str(target), "train") is None
    assert "checking images (25 of 25 parts to do)" in (tmp_path / "killed.log").read_text()
    capsys.readouterr()
    assert prepare_data.main(flags) == 0
    said = capsys.readouterr().out.splitlines()
    said = [line for line in said if "so far" not in line]
    assert said[0] == f"split 'train' of {source}: looking what is there"
    assert said[1:3] == ["starting Ray", f"checking images ({25 - len(parts)} of 25 parts to do)"]
    assert "writing shards (13 of 13 shards to do)" in said
    assert re.fullmatch(r"  399 images in 0:\d\d:\d\d", said[-3])
    assert "399 images of 2 classes" in said[-2]
    assert said[-1] == f"1 damaged image left out (see train.damaged.json); digest {manifest.digest}"
    (target / "ray.log").unlink()
    assert files(target) == files(expected)
    assert prepare_data.main(flags) == 0
    assert capsys.readouterr().out.splitlines() == [said[0], *said[-2:]], "a finished set only prints its summary"
    assert files(target) == files(expected)
