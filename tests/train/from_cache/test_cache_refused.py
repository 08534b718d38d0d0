"""Caches that do not fit a run, or whose teacher, pixels or calibration are others: refused, with the remedy."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_cache import STEPS, build_here, cached_config, live, walk

from mimkd_ray.cli.cache_teacher import main
from mimkd_ray.cli.preflight import preflight
from mimkd_ray.config import Config, LaunchConfig
from mimkd_ray.config.digest import digest
from mimkd_ray.data.augment.views import View
from mimkd_ray.errors import DamagedDataError, UserError
from mimkd_ray.train.networks.build import build_network

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "views": ({"data": {"views": 3}}, r"view 2 is missing, 2 are there \(--data.views\)"),
    "seed": ({"train": {"seed": 5}, "data": {"view_seed": 3}}, r"seed of the views \(--data.view-seed\): 0, not 3"),
    "pipeline": ({"data": {"pipeline": "none"}}, r"view pipeline \(--data.pipeline\): digits, not none"),
    "data": ({"data": {"subset": 70}}, r"data set \(--data.root, its split, holdout or subset\)"),
    "codec": ({"cache": {"codecs": ("stage3=fp16",)}}, r"codec \(--cache.codecs\): pool4,pca256,uint8, not fp16"),
    "logits": (
        {"cache": {"logits": "top3"}},
        r"run: logits: the nearest one there has another codec \(--cache.logits\): fp16, not top3\. Build .*"
        r"--cache.logits top3",
    ),
    "precision": ({"cache": {"precision": "bf16"}}, r"precision \(--cache.precision\): float32, not bf16"),
    "teacher": ({"teacher": {"name": "cifar/resnet8"}}, r"teacher \(--teacher.name\): cifar/resnet8_w4, not"),
    "more views": ({"data": {"views": 4}}, r"pixels: views 2, 3 are missing, 2 are there"),
    "calibration": (
        {"cache": {"calibration_rows": 50}},
        r"calibration of the codec \(--cache.calibration-rows\): [0-9a-f]{16}, and this run's has not been fitted",
    ),
    "tap": (
        {"loss": {"feature_pairs": ("stage2:stage3",)}},
        r"stage2:map: this tap is not cached; there are logits, pool \(vector\), stage3 \(map\)\. Build",
    ),
    "mean": ({"data": {"mean": (0.5, 0.5, 0.5)}}, r"mean \(--data.mean, .*\): \[0.305, 0.305, 0.305\], not \[0.5,"),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built cache, which no test changes."""
    root = tmp_path_factory.mktemp("built") / "cache"
    build_here(cached_config(root))
    return root


@pytest.mark.parametrize("what", REFUSED)
def test_a_mismatch_names_what_differs(cache: Path, tmp_path: Path, what: str) -> None:
    sections, message = REFUSED[what]
    config = cached_config(cache, **sections)
    with pytest.raises(UserError, match=message) as caught:
        walk(config, tmp_path / "run")
    said = str(caught.value)
    with pytest.raises(UserError) as before:
        preflight(config)
    assert str(before.value) == said, "known before any worker starts"
    assert said.startswith(f"the cache {cache} does not fit this run: ")
    assert f"python jobs/cache_teacher.py custom --data.subset {sections.get('data', {}).get('subset', 60)}" in said


def test_a_cache_of_other_view_seeds_is_pointed_at(tmp_path: Path) -> None:
    save_file(build_network(cached_config(tmp_path), 10, "random").state_dict(), tmp_path / "teacher.safetensors")
    teacher = {"weights": str(tmp_path / "teacher.safetensors")}
    build_here(cached_config(tmp_path / "cache", teacher=teacher, data={"view_seed": 7}))
    with pytest.raises(UserError, match=r"does not fit this run: pass --data\.view-seed 7, which reads the one that"):
        preflight(cached_config(tmp_path / "cache", teacher=teacher, train={"seed": 1}))
    preflight(cached_config(tmp_path / "cache", teacher=teacher, train={"seed": 1}, data={"view_seed": 7}))


def test_a_cache_that_fits_passes_before_workers_start(cache: Path, tmp_path: Path) -> None:
    """One run and a comparison; and where workers may have another device, a cache that only they could use."""
    config = cached_config(cache)
    preflight(config)
    preflight(replace(config, compare=replace(config.compare, seeds=2)))
    of_gpu = replace(config, cache=replace(config.cache, root=str(tmp_path / "bf16"), precision="bf16"))
    build_here(of_gpu)
    preflight(replace(of_gpu, cache=replace(of_gpu.cache, precision="auto")))
    on_cpu = replace(config, cache=replace(config.cache, root=of_gpu.cache.root), launch=LaunchConfig(gpu="off"))
    with pytest.raises(UserError, match=r"teacher's precision \(--cache.precision\): bf16, not float32"):
        preflight(on_cpu)
    with pytest.raises(UserError, match="top10, and there are 10 classes"):
        preflight(replace(config, cache=replace(config.cache, logits="top10", live=True)))
    published = replace(config, teacher=replace(config.teacher, weights="published"))
    with pytest.raises(UserError, match="no published weights for cifar/resnet8"):
        preflight(published)


def test_a_codec_of_no_tap(cache: Path, tmp_path: Path) -> None:
    """Refused with a cache too; a codec of a layer that only other runs read is none of this run's business."""
    for wrong in ("stge3=fp16", "logits=fp32"):
        config = cached_config(cache, cache={"codecs": (wrong,)})
        for own in (config, live(config)):
            with pytest.raises(
                UserError, match=r"there is no tap '.*; there are maps, .* \(logits have --cache.logits\)"
            ):
                walk(own, tmp_path / "run")
    preflight(cached_config(cache, cache={"codecs": ("stage2:map=fp16", "stage1=bf16")}))


def test_a_calibration_that_is_damaged(tmp_path: Path) -> None:
    config = cached_config(tmp_path / "cache")
    build_here(config)
    (file,) = (tmp_path / "cache" / "calibrations").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    for read in (preflight, lambda own: walk(own, tmp_path / "run")):
        with pytest.raises(
            DamagedDataError, match=r"\.safetensors \(100 bytes\) is no calibration .*; put it back from"
        ):
            read(config)


def test_weights_are_told_apart(cache: Path, tmp_path: Path) -> None:
    config = cached_config(cache, data={"view_seed": 0}, train={"seed": 5})  # another random teacher
    with pytest.raises(
        UserError, match=r"teacher's weights \(--teacher.weights\): [0-9a-f]{12}\.\.\., not [0-9a-f]{12}"
    ):
        walk(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"views": 0}}, "data.views is 0, a new view every epoch"),
        ({"mix": {"mixup_alpha": 0.2}}, "features of a mixed image are no mix of features"),
        ({"cache": {"codecs": ("stage3",)}}, "is not TAP=CODEC"),
        (
            {"cache": {"logits": "top3"}, "loss": {"kd_logits": "standardised"}},
            "all of the teacher.s logits, and .*top3",
        ),
        ({"cache": {"logits": "top0"}}, "cache.logits 'top0' cannot be read"),
        ({"cache": {"tolerance": 0.0}}, "cache.tolerance is 0.0"),
        ({"cache": {"workers": "3..1"}}, "cache.workers is '3..1'"),
        ({"cache": {"batch": 0}}, "cache.batch is 0"),
    ],
)
def test_senseless_configs(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cached_config(tmp_path, **sections)


def test_mixing_is_legal_with_a_live_teacher(tmp_path: Path) -> None:
    cached_config(tmp_path, mix={"mixup_alpha": 0.2}, cache={"live": True})


def test_what_building_alone_reads_is_not_in_a_runs_digest(tmp_path: Path) -> None:
    config = cached_config(tmp_path)
    assert digest(config) == digest(cached_config(tmp_path, cache={"batch": 5, "shard_rows": 7, "workers": 3}))
    assert digest(config) != digest(cached_config(tmp_path, cache={"codecs": ("maps=fp16",)}))


def test_drift_of_the_teacher_stops_the_run(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library whose arithmetic has changed: the weights are the same, and the features are not."""
    config = cached_config(cache)
    real = torch.nn.functional.relu
    monkeypatch.setattr(torch.nn.functional, "relu", lambda x, inplace=False: real(x) + 0.05)
    with pytest.raises(DamagedDataError, match=r"step 0, lane 0, view \d: cached features of .* differ from those"):
        walk(config, tmp_path / "run")


def test_another_decoder_stops_the_run(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = cached_config(cache)
    real = View.replay
    monkeypatch.setattr(View, "replay", lambda *a: (real(*a).float() * 0.8).byte())
    with pytest.raises(DamagedDataError, match=r"step 0, lane 0, view \d: image \d+ has other pixels than when"):
        walk(config, tmp_path / "run")


def test_the_command_that_is_named_builds_what_is_missing(tmp_path: Path) -> None:
    config = cached_config(
        tmp_path / "cache",
        data={"views": 3, "mean": (0.5, 0.25, 0.5), "labels": "none", "max_damaged": 0.5, "max_pixels": 9000},
        cache={"codecs": ("stage3=pool1,uint8", "vectors=bf16")},
        loss={"global_weight": 0.0},
        train={"seed": 4},
    )
    with pytest.raises(UserError, match=r"stage3:map, logits, pixels: nothing is cached there yet\. Build") as caught:
        walk(config, tmp_path / "run")
    _, _, command = str(caught.value).partition("Build what is missing with: ")
    python, job, *arguments = shlex.split(command)
    assert (python, job) == ("python", "jobs/cache_teacher.py")
    assert {"--data.labels", "--data.max-damaged", "--data.max-pixels"} <= set(arguments)
    assert main({"custom": Config}, [*arguments, "--launch.backend", "local"]) == 0
    assert len(walk(config, tmp_path / "run")["losses"]) == STEPS
