"""Bad input of an export: one line each, with the thing, the numbers and the remedy."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import run_tiny, tiny_config
from torch import Tensor, nn

from mimkd_ray.__main__ import main
from mimkd_ray.config.form.json_form import to_dict
from mimkd_ray.config.jobs.export import REFUSED
from mimkd_ray.errors import UserError
from mimkd_ray.export.deployed import Deployed
from mimkd_ray.export.examine import (
    Figures,
    best_int8,
    fault_at_float32,
    fault_of_int8,
    no_better_than_chance,
    too_little_of_int8,
)
from mimkd_ray.models.build_model import build_model
from mimkd_ray.models.outputs import describe
from mimkd_ray.run_lock import held
from mimkd_ray.train.records.read_run import student_of_run

QUICK = ("--images", "20", "--calibration", "20", "--threads", "1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run_tiny(folder, train={"ema_decay": 0.5})
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def stopped(run: Path) -> Path:
    """The run as if it had been stopped."""
    for name in ("student.safetensors", "result.json"):
        (run / name).unlink()
    return run


def _without_chance(said: str) -> list[str]:
    """Lines but the one that a student of few steps, or of none, is at chance."""
    return [line for line in said.splitlines() if "is that of chance" not in line]


def _said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    capsys.readouterr()
    assert main(["export", *arguments, *QUICK]) == status
    (line,) = _without_chance(capsys.readouterr().err)
    return line


def test_a_stopped_run_gives_the_moving_average_of_its_newest_checkpoint(stopped: Path) -> None:
    model, where = student_of_run(str(stopped), "cifar/resnet8_w4", 10, 8)
    assert "/checkpoints/step_00000003-" in where
    state = torch.load(f"{where}/state.pt", weights_only=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["ema"][f"module.model.{name}"])
    assert not torch.equal(model.stem[0].weight, state["distiller"]["student.model.stem.0.weight"])


def test_a_run_without_a_checkpoint(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = stopped.glob("checkpoints/*/state.pt")
    file.write_bytes(file.read_bytes()[:-5])
    said = _said(capsys, str(stopped))
    assert "has no student.safetensors and its only checkpoint is damaged: let the run go on" in said
    shutil.rmtree(stopped / "checkpoints")
    assert "has no student.safetensors and no checkpoint: let the run go on" in _said(capsys, str(stopped))


def test_a_second_start_while_the_first_goes_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(str(run / "export")):
        said = _said(capsys, str(run))
    assert "run/export is in use by process" in said
    assert "or pass another --out;" in said
    assert not any((run / "export").iterdir())


def test_what_is_no_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "/none has no config.json, nor is there such a folder: give the directory of a run" in _said(
        capsys, str(tmp_path / "none")
    )
    (run / "config.json").write_text("{")
    assert "run/config.json (1 bytes) is damaged: " in _said(capsys, str(run), status=1)
    (run / "config.json").write_text(json.dumps(to_dict(tiny_config(compare={"seeds": 3}))))
    (run / "mimkd-seed00").mkdir()
    assert f"is a comparison of several runs: name one of them, such as {run}/mimkd-seed00" in _said(capsys, str(run))
    assert "nothing to export: give the directory of a run, or --network" in _said(capsys)


def test_a_folder_of_somebody_else_is_left_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = (run / "config.json").read_text()
    assert f"{run} is the directory of a run, whose config.json an export would replace" in _said(
        capsys, str(run), "--out", str(run)
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    said = _said(capsys, str(run), "--out", str(tmp_path / "mine"))
    assert f"{tmp_path}/mine has README.md and no export.json" in said
    assert "give an empty folder with --out" in said
    assert (run / "config.json").read_text() == config
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["README.md"]


def test_a_damaged_student(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = run / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    said = _said(capsys, str(run))
    assert f"weights {weights}: not a readable safetensors file of 1000 bytes" in said


def test_data_of_other_classes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = _said(capsys, str(run), "--data.num-classes", "12")
    assert "student.safetensors have 10 classes, the data has 12: pass other weights" in said
    assert not (run / "export").exists()
    wide = ("--network", "tiny_run:of_a_thousand", "--weights", "random", "--out", str(run / "export"))
    said = _said(capsys, *wide, "--data.root", "digits", "--data.image-size", "8", "--data.pipeline", "digits")
    assert "gives 1000 logits, and the data has 10 classes" in said


def flat(num_classes: int) -> nn.Module:
    """For 8 pixels alone."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))


def test_a_run_whose_student_takes_no_other_image_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(student={"name": f"{__name__}:flat"})
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    save_file(flat(10).state_dict(), tmp_path / "student.safetensors")
    said = _said(capsys, str(tmp_path), "--data.image-size", "9")
    assert "flat failed on a dry run with images of 3x9x9" in said


def sets() -> list[tuple[Tensor, int]]:
    raise UserError("called")


def test_data_that_a_function_returns(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _said(capsys, str(run), "--data.root", f"{__name__}:sets").endswith("called")


def test_a_missing_package(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "needs onnxscript, which is not installed: pip install mimkd-ray[export]" in _said(capsys, str(run))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = _said(capsys, str(run), "--formats", "pt2", "--push-to", "org/net")
    assert "--push-to org/net needs huggingface_hub, which is not installed: pip install mimkd-ray[export]" in said
    monkeypatch.setitem(sys.modules, "coremltools", None)
    said = _said(capsys, str(run), "--formats", "coreml")
    assert "needs coremltools, which is not installed: pip install mimkd-ray[coreml]" in said
    monkeypatch.setitem(sys.modules, "executorch", None)
    said = _said(capsys, str(run), "--formats", "executorch")
    assert "needs executorch, which is not installed: pip install mimkd-ray[executorch]" in said
    assert "--push-to x: give ORG/NAME" in _said(capsys, str(run), "--push-to", "x")


@pytest.mark.parametrize("name", REFUSED)
def test_formats_that_cannot_be_made(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = _said(capsys, str(run), "--formats", "onnx", name)
    assert said.endswith(f" export: --formats {name}: {REFUSED[name]}: convert student.onnx or student.pt2 yourself")


class Bessel(nn.Module):
    """ONNX has no such operation."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.special.bessel_j0(images.mean((2, 3))))


class Branching(Bessel):
    """What it does depends on values, which no trace can follow."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3)))


@pytest.mark.parametrize(("name", "reason"), [("Bessel", "onnx: .*bessel_j0"), ("Branching", "pt2: .*data-dependent")])
def test_an_operator_that_cannot_be_exported(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    weights = tmp_path / "w.pth"
    torch.save(globals()[name](10).state_dict(), weights)
    network = f"{Path(__file__).stem}:{name}"
    student = ("--network", network, "--weights", str(weights), "--data.root", "digits", "--data.image-size", "8")
    wanted = "onnx" if name == "Bessel" else "pt2"
    said = _said(
        capsys, *student, "--data.pipeline", "none", "--out", str(tmp_path / "out"), "--formats", wanted, status=1
    )
    assert re.search(reason, said), said
    assert f"{network} cannot be exported" in said
    assert said.endswith("it is not written")
    assert not list((tmp_path / "out").glob("student.*"))


def _figures(**values: float) -> Figures:
    default = {"bytes": 1, "max_logit_difference": 0.0, "agreement": 100.0, "top1": 70.0}
    milliseconds = {"1": values.pop("ms", 1.0), "32": 1.0}
    found = {**default, **values}
    right_N = torch.arange(1000) < 10 * found["top1"]
    return Figures(latency_ms=milliseconds, right_N=right_N, **found)  # type: ignore[arg-type]


def test_files_that_are_not_the_student() -> None:
    assert fault_at_float32(_figures()) == ""
    assert "differ from the student's by up to 0.002" in fault_at_float32(_figures(max_logit_difference=0.002))
    assert "agrees on 99.00 % of the images" in fault_at_float32(_figures(agreement=99.0))
    assert fault_at_float32(_figures(max_logit_difference=float("nan")))
    assert fault_of_int8(_figures(top1=69.0), _figures(), 1.0) == ""
    assert "68.50 % on these images, 1.50 points below the student's 70.00 % (1 are allowed)" in fault_of_int8(
        _figures(top1=68.5), _figures(), 1.0
    )
    # With 10 classes 100 of 1000 images are right by chance, and sqrt(1000 * 0.1 * 0.9) = 9.5 is the standard error.
    assert no_better_than_chance(_figures(top1=11.9), 10) == ""
    assert "top-1, 11.80 % of 1,000 images, is that of chance (10.00 % with 10 classes)" in no_better_than_chance(
        _figures(top1=11.8), 10
    )
    assert no_better_than_chance(dataclasses.replace(_figures(top1=11.8), top1=None), 10) == "", "no labels"
    assert no_better_than_chance(_figures(top1=100.0), 1) == "", "there is no better one"
    big = _figures(bytes=300)
    assert too_little_of_int8(_figures(bytes=100, ms=1.0), big, 1.0) == ""
    assert too_little_of_int8(_figures(bytes=120, ms=1.2), big, 1.0) == (
        "is 2.5 times smaller than the weights at float32, not 3 times smaller and takes 1.20 ms at batch "
        "1, float32 1.00 ms"
    )
    assert "is 2.0 times as large as the weights at float32" in too_little_of_int8(_figures(bytes=600), big, 9.0)
    # Of 1000 images 10 more are right, and sqrt(10) is the standard error of that; of 3 it is sqrt(3).
    assert best_int8({"a": _figures(top1=69.0, ms=9.0), "b": _figures(top1=68.0)}, 0) == "a"
    assert best_int8({"a": _figures(top1=69.0, ms=9.0), "b": _figures(top1=68.7)}, 0) == "b"
    assert best_int8({"a": _figures(top1=69.0, ms=9.0), "b": _figures(top1=68.7)}, 68.9) == "a", "b is not enough"
    assert best_int8({"a": _figures(top1=69.0, ms=9.0), "b": _figures(top1=68.7)}, 70) == "b", "neither is"


def test_a_file_with_other_logits_is_not_kept(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mimkd_ray.export import export_student

    right, folder = export_student.write_pt2, export_student.write_model_folder

    def wrong(network: Deployed, example: Tensor, path: Path) -> None:
        broken = Deployed(network.model, (0.3, 0.3, 0.3), (0.2, 0.2, 0.2), normalize=True)
        right(broken, example, path)

    def of_another(model: nn.Module, *rest: Any) -> None:
        folder(build_model(describe(model), 10), *rest)

    monkeypatch.setattr(export_student, "write_pt2", wrong)
    monkeypatch.setattr(export_student, "write_model_folder", of_another)
    assert main(["export", str(run), "--formats", "pt2", *QUICK]) == 1
    said = _without_chance(capsys.readouterr().err)
    assert len(said) == 2
    assert "model folder: its logits differ from the student's by up to" in said[0]
    assert "pt2: its logits differ from the student's by up to" in said[1]
    written = {path.name for path in (run / "export").iterdir()}
    assert written == {"README.md", "export.json", "training_config.json"}
