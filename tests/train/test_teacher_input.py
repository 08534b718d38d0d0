"""A teacher with a size, a normalisation and an interpolation of its own: the student's views, as it wants them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_cache import cached_config
from tiny_run import cpu, run_tiny, tiny_config, tiny_data
from torchvision.transforms.v2.functional import resize, to_dtype

from mimkd_ray import console
from mimkd_ray.cli.preflight import preflight
from mimkd_ray.config import DataConfig
from mimkd_ray.errors import UserError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.models.published_input import NetworkInput, published_input
from mimkd_ray.train.engine.student import lone_student
from mimkd_ray.train.from_cache.cached_teacher import origin_of
from mimkd_ray.train.networks.build import plan_student, teacher_images
from mimkd_ray.train.networks.student_module import Normalizer
from mimkd_ray.train.networks.teacher_input import TeacherImages, teacher_input

OWN: dict[str, Any] = {"image_size": 12, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "interpolation": "bilinear"}


@pytest.fixture(autouse=True)
def _nothing_said() -> None:
    console.told.clear()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [20, 48, 32])
def test_images_are_resized_and_normalised_as_pillow_and_torchvision_do(side: int, interpolation: Any) -> None:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    picture = small.resize((32, 32), Image.Resampling.BICUBIC)
    pixels_BCHW = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    data = DataConfig(image_size=32, mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4))
    normalize = Normalizer(data.mean, data.std, torch.device("cpu"), torch.float32, channels_last=False)
    wanted = NetworkInput(side, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), interpolation)
    made = TeacherImages(data, wanted, torch.device("cpu"), torch.float32)(normalize(pixels_BCHW))
    back = made * torch.tensor(wanted.std).view(3, 1, 1) + torch.tensor(wanted.mean).view(3, 1, 1)
    exact = resize(to_dtype(pixels_BCHW, torch.float32, scale=True), [side, side], interpolation, antialias=True)
    assert torch.allclose(back, exact.clamp(0, 1), atol=1e-5)
    pillow = picture.resize((side, side), Image.Resampling[interpolation.upper()])
    assert (back * 255 - torch.from_numpy(np.array(pillow)).permute(2, 0, 1)).abs().max() < 2, "Pillow rounds twice"


def test_a_plain_teacher_sees_what_the_student_sees() -> None:
    config = tiny_config()
    images = torch.randn(2, 3, 8, 8)
    assert teacher_images(config, torch.device("cpu"))(images) is images


def test_what_publishers_say() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert published_input("resnet34") == NetworkInput(224, mean, std, "bilinear")
    assert published_input("vit_h_14") == NetworkInput(518, mean, std, "bicubic")
    assert published_input("cifar/resnet8") is None
    assert published_input("my.nets:small") is None


def test_timm_says_it_too(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    half = (0.5, 0.5, 0.5)
    assert published_input("timm/vit_tiny_patch16_384.augreg_in21k_ft_in1k") == NetworkInput(384, half, half, "bicubic")
    settings = {"num_classes": 7, "input_size": [3, 24, 24], "mean": [0.1, 0.2, 0.3], "std": half, "interpolation": "x"}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "lcnet_035", "pretrained_cfg": settings}))
    assert published_input(f"local-dir:{tmp_path}") == NetworkInput(24, (0.1, 0.2, 0.3), half, "bicubic")


def test_a_network_that_is_published_without_a_classifier_returns_its_features() -> None:
    pytest.importorskip("timm")
    name = "timm/vit_small_patch14_dinov2.lvd142m"
    with torch.device("meta"):
        model = build_model(name, 384, image_size=28)
        assert model(torch.zeros(1, 3, 28, 28)).shape == (1, 384)
        assert build_model(name, 10, image_size=28)(torch.zeros(1, 3, 28, 28)).shape == (1, 10)
    with pytest.raises(UserError, match=r"returns 384 features; for a teacher pass --teacher.classes 384"):
        build_model(name, 10, "published", image_size=28)


def test_auto_is_own_for_published_weights(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(teacher={"name": "vit_b_16", "weights": "published"})
    assert teacher_input(config).size == 224
    assert "sees the views at 224 pixels (the student at 8)" in caplog.text
    for fields in ({"weights": "random"}, {"input": "data"}):
        plain = replace(config, teacher=replace(config.teacher, **fields))
        assert (teacher_input(plain).size, teacher_input(plain).mean) == (8, config.data.mean)
    assert teacher_input(replace(config, teacher=replace(config.teacher, image_size=64))).size == 64


def test_a_run_and_the_teachers_own_evaluation(tmp_path: Path) -> None:
    """The first lane's features and the held-out accuracy are those of the network on images made by torchvision."""
    config = tiny_config(teacher=OWN)
    preflight(config)
    result = run_tiny(tmp_path / "run", teacher=OWN)
    data = tiny_data(config)
    network = build_model("cifar/resnet8", 10).eval()
    student = lone_student(config, data, network, cpu())
    student.inputs.start(0)
    (lane, _) = student.inputs.step(0)
    assert lane.teacher is not None

    def seen(pixels_BCHW: torch.Tensor) -> torch.Tensor:
        wide = F.interpolate(pixels_BCHW.float() / 255, (12, 12), mode="bilinear", antialias=True)
        return (wide - torch.tensor(OWN["mean"]).view(3, 1, 1)) / torch.tensor(OWN["std"]).view(3, 1, 1)

    data_scale = torch.tensor(config.data.std).view(3, 1, 1), torch.tensor(config.data.mean).view(3, 1, 1)
    pixels = (lane.images_BCHW * data_scale[0] + data_scale[1]) * 255
    assert torch.allclose(lane.teacher.logits_BC, network(seen(pixels)), atol=1e-4)
    assert lane.images_BCHW.shape[-1] == 8
    assert result["teacher"]["rows"] == data.val.num_rows


def test_cache_keys_have_it_only_where_it_is(tmp_path: Path) -> None:
    data, network = tiny_data(), build_model("cifar/resnet8", 10)

    def parts(**teacher: Any) -> dict[str, Any]:
        return asdict(origin_of(tiny_config(teacher=teacher), data, network, torch.device("cpu")))

    plain, own = parts(), parts(**OWN)
    assert plain["resized"] == ""
    assert {k: own[k] for k in own if own[k] != plain[k]} == {
        "resized": "12 bilinear",
        "mean": OWN["mean"],
        "std": OWN["std"],
    }
    with pytest.raises(UserError, match=r"--teacher.image-size 12 --teacher.mean 0.5 0.4 0.3"):
        preflight(cached_config(tmp_path / "cache", teacher=OWN))


def test_taps_are_those_of_the_teachers_size() -> None:
    config = tiny_config(teacher={"image_size": 16})
    planned = plan_student(config, build_model("cifar/resnet8", 10), 10)
    assert planned.plan.teacher_shapes["stage3"].height == 4
    assert planned.plan.student_shapes["stage3"].height == 2


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"mean": (0.5,)}, "three numbers"),
        ({"std": (0.2, 0.0, 0.2)}, "three positive deviations"),
        ({"image_size": 9000}, "8,192 at most"),
        ({"train": True, "image_size": 16}, "trains it on the student's images"),
    ],
)
def test_what_makes_no_images_is_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        tiny_config(teacher=fields)
    with pytest.raises(UserError, match="nobody has said what images cifar/resnet8 takes"):
        preflight(tiny_config(teacher={"input": "own"}))
