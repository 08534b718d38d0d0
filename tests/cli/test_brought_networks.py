"""Networks and weights that people bring, as a job sees them before its workers start."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_config

from mimkd_ray import console
from mimkd_ray.cli.preflight import preflight
from mimkd_ray.cli.training import absolute
from mimkd_ray.config import ModelConfig
from mimkd_ray.errors import UserError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.secret_urls import redacted
from mimkd_ray.train.networks.build import build_network, build_student


@pytest.fixture(autouse=True)
def _nothing_said() -> None:
    console.told.clear()


def test_places_are_absolute_and_names_of_the_hub_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = os.getcwd()
    for given, found in {
        "w.ckpt": f"{here}/w.ckpt",
        "hf-hub:org/net": "hf-hub:org/net",
        "local-dir:nets/a": f"local-dir:{here}/nets/a",
        "https://host/w.pth?sig=a%2Fb": "https://host/w.pth?sig=a%2Fb",
        "published": "published",
    }.items():
        config = tiny_config(teacher={"weights": given})
        assert absolute(config).teacher.weights == redacted(found)
    for given, found in {
        "local-dir:nets/a": f"local-dir:{here}/nets/a",
        "timm/local-dir:nets/a": f"timm/local-dir:{here}/nets/a",
        "hf-hub:org/net": "hf-hub:org/net",
        "cifar/resnet8": "cifar/resnet8",
        "my.nets:small": "my.nets:small",
    }.items():
        config = replace(tiny_config(), student=ModelConfig(name=given))
        assert absolute(config).student.name == found


def test_a_student_starts_from_weights_of_other_classes_and_a_teacher_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"state_dict_ema": build_model("cifar/resnet8_w4", 100).state_dict()}, tmp_path / "w.pth.tar")
    weights = str(tmp_path / "w.pth.tar")
    config = tiny_config(student={"name": "cifar/resnet8_w4", "weights": weights})
    with caplog.at_level(logging.WARNING):
        preflight(config)
    assert caplog.messages == [
        f"weights {weights} have 100 classes, the data has 10: the classifier starts anew, all else is loaded"
    ]
    one, two = build_student(config, 10), build_student(config, 10)
    assert torch.equal(one.head.weight, two.head.weight), "a function of the seed"
    as_teacher = tiny_config(teacher={"name": "cifar/resnet8_w4", "weights": weights})
    for call in (lambda: preflight(as_teacher), lambda: build_network(as_teacher, 10, weights)):
        with pytest.raises(
            UserError, match=r"have 100 classes, the data has 10: pass other weights, or --data.num-classes 100"
        ):
            call()


def test_a_web_server_is_not_asked_whether_the_file_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signed addresses may only be read; what cannot be read is told when it is."""
    for weights in ("https://127.0.0.1:1/w.pth?Signature=cret", "http://127.0.0.1:1/file"):
        with pytest.raises(UserError, match=r"cannot be read: .*copy the file here and pass its path") as caught:
            preflight(tiny_config(teacher={"weights": weights}))
        assert "cret" not in str(caught.value)
