"""The card and the config of an export: only figures that are known and its own, and no folder of this machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_run import tiny_config
from torch import nn

from mimkd_ray.config import ExportConfig
from mimkd_ray.export import examine
from mimkd_ray.export.deployed import Deployed
from mimkd_ray.export.examine import Comparison, fault_of_int8
from mimkd_ray.export.export_student import head_learns
from mimkd_ray.export.images import Images
from mimkd_ray.export.model_card import model_card, portable
from mimkd_ray.train.records.read_run import RunFacts

STUDENT = {"file": "model.safetensors", "bytes": 9, "max_logit_difference": 0.0, "agreement": 100.0, "top1": 61.25}
REPORT: dict[str, Any] = {
    "network": "cifar/resnet8_w4", "classes": 10, "image_size": 8, "parameters": 9, "macs": 9, "input": "images",
    "images": {"compared": 150}, "files": {}, "failed": {}, "not_compared": {}, "threads": 1,
    "student": {**STUDENT, "latency_ms": {"1": 1.0, "32": 1.0}},
}  # fmt: skip
RESULT = {"student": {"top1": 70.5, "rows": 450}, "teacher": {"name": "cifar/resnet8", "top1": 80.25}}


def card_of(result: dict[str, Any], top1: float | None = 61.25, data: dict[str, Any] | None = None) -> tuple[Any, str]:
    """Front matter and text of the card of a run with this result, exported on its data, or on other."""
    config = tiny_config()
    report = {**REPORT, "student": {**REPORT["student"], "top1": top1}}
    own = ExportConfig(network="cifar/resnet8_w4", data=replace(config.data, **data or {}))
    _, front, text = model_card(report, own, RunFacts("/runs/x", config, result)).split("---\n", 2)
    return yaml.safe_load(front), text


def top1_in(front: Any) -> tuple[float, str, str]:
    (result,) = front["model-index"][0]["results"]
    (metric,) = result["metrics"]
    return metric["value"], metric["name"], result["dataset"]["name"]


def test_the_runs_figure_is_of_the_runs_data() -> None:
    front, text = card_of(RESULT)
    assert top1_in(front) == (70.5, "top-1 % of 450 images", "digits")
    assert "top-1 70.50 % of 450 held-out images. Distilled from `cifar/resnet8` (top-1 80.25 %) by" in text
    for data in ({"root": "/data/other"}, {"holdout": 0.5}):
        front, text = card_of(RESULT, data=data)
        assert top1_in(front)[:2] == (61.25, "top-1 % of 150 images")
        assert "top-1 61.25 % of 150 held-out images" in text


def test_accuracies_that_are_not_known_are_left_out() -> None:
    """A teacher with classes of its own; images without labels; both for a run that was stopped too."""
    _, text = card_of({**RESULT, "teacher": {"name": "vit", "top1": None}})
    assert "Distilled from `vit` by maximising" in text
    for result in ({"student": {"top1": None, "rows": 0}, "teacher": RESULT["teacher"]}, RESULT, {}):
        front, text = card_of(result, top1=None)
        assert "model-index" not in front
        assert "multiply-adds an image. Distilled" in text
        assert "| model.safetensors | 9 | 0 | 100.00 | - | 1.00 | 1.00 |" in text


def test_a_head_that_nothing_has_trained_predicts_nothing() -> None:
    config = tiny_config(data={"labels": "none"})
    given = ExportConfig(weights="w.safetensors")
    assert not head_learns(ExportConfig(), RunFacts("", config, {"student": {"head_learns": False}}))
    assert not head_learns(ExportConfig(), RunFacts("", config)), "of a run that was stopped"
    assert head_learns(ExportConfig(), RunFacts("", tiny_config(), RESULT))
    assert head_learns(given, RunFacts("", config))


def test_without_labels_int8_is_judged_by_the_students_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "latency_ms", lambda *_: {})
    torch.manual_seed(0)
    network = Deployed(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (0.0,) * 3, (1.0,) * 3, normalize=False)
    network.model.zoo_classes = 3
    pixels = torch.randint(0, 256, (50, 3, 2, 2), dtype=torch.uint8)
    compare = Comparison.of(network, Images(pixels, torch.full((50,), -1)), threads=1)
    student = compare.student(9)
    assert (student.top1, student.right) == (None, 100)
    half = iter((0, 1))  # of the batches of 32 and 18 images: in the second every answer is another
    other = compare.examine(lambda images: network(images).roll(next(half), 1), tmp_path)
    assert (other.top1, other.right) == (None, 64)
    assert "without labels, it agrees with the student on" in fault_of_int8(other, student, 1.0)


def test_no_folder_of_this_machine() -> None:
    config = tiny_config(
        data={"root": "/home/me/images", "store": "/home/me/store"},
        teacher={"name": "local-dir:/home/me/vit", "weights": "/home/me/w.pth", "classes": "/home/me/names.txt"},
        student={"name": "timm/local-dir:/home/me/net", "weights": "local-dir:/home/me/net"},
        cache={"root": "/home/me/cache", "live": True},
        run={"root": "/home/me/runs", "start_from": "/home/me/runs/first"},
    )
    saved = portable(config)
    assert "/home" not in json.dumps(saved)
    assert saved["teacher"]["name"] == "local-dir:vit"
    assert (saved["student"]["name"], saved["student"]["weights"]) == ("timm/local-dir:net", "local-dir:net")
    assert (saved["run"]["start_from"], saved["teacher"]["classes"]) == ("first", "names.txt")
    assert portable(tiny_config(data={"root": "s3://bucket/set"}))["data"]["root"] == "s3://bucket/set"
    own = ExportConfig(network=config.student.name, data=config.data)
    for facts in (RunFacts("/home/me/runs/x", config), None):
        assert "/home" not in model_card(REPORT, own, facts)
