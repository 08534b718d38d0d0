"""Core ML packages: what is written, and what is said where Core ML does not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mimkd_ray.__main__ import main
from mimkd_ray.export import coreml_file
from mimkd_ray.models.build_model import build_model
from mimkd_ray.train.records.run_files import OF_AN_EXPORT

coremltools = pytest.importorskip("coremltools", reason="coremltools is not installed: pip install mimkd-ray[coreml]")


def test_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    student = build_model("cifar/resnet8_w4", 10).eval()
    torch.save(student.state_dict(), tmp_path / "w.pth")
    out = tmp_path / "out"
    monkeypatch.setattr(coreml_file, "RUNS_HERE", False)
    named = ["--network", "cifar/resnet8_w4", "--weights", str(tmp_path / "w.pth"), "--data.root", "digits"]
    assert main(["export", *named, "--images", "40", "--threads", "1", "--out", str(out), "--formats", "coreml"]) == 0
    said = capsys.readouterr().err
    assert said.endswith("MB) is converted but not compared: Core ML runs on macOS alone\n")
    assert "`student.mlpackage` was not compared: Core ML runs on macOS alone." in (out / "README.md").read_text()
    report = json.loads((out / "export.json").read_text())
    paths = [path for path in (out / "student.mlpackage").rglob("*") if path.is_file()]
    assert report["files"] == {}
    assert report["not_compared"]["coreml"]["bytes"] == sum(path.stat().st_size for path in paths) > 0
    assert {path.relative_to(out).as_posix() for path in paths} <= set(OF_AN_EXPORT)
    described = coremltools.utils.load_spec(str(out / "student.mlpackage")).description
    assert [each.name for each in (*described.input, *described.output)] == ["images", "logits"]
    sizes = [
        (each.lowerBound, each.upperBound) for each in described.input[0].type.multiArrayType.shapeRange.sizeRanges
    ]
    assert sizes == [(1, 65536), (3, 3), (32, 32), (32, 32)]


def test_a_package_is_run_by_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        """Stands in for Core ML's own runtime."""

        def __init__(self, path: str) -> None:
            assert path == "student.mlpackage"

        def predict(self, values: dict[str, Any]) -> dict[str, Any]:
            return {"logits": values["images"].mean((2, 3))}

    monkeypatch.setattr(coremltools.models, "MLModel", Model)
    images = torch.rand(2, 3, 4, 4)
    assert torch.allclose(coreml_file.coreml_runner(Path("student.mlpackage"))(images), images.mean((2, 3)))
