"""An export of a small run: its files against networks and normalisation that are put together here."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs_here import ROOT
from safetensors.torch import load_file
from tiny_run import run_tiny, tiny_config
from torch import Tensor, nn

from mimkd_ray.__main__ import main
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.export import examine, export_student
from mimkd_ray.export.int8 import quantize_onnx
from mimkd_ray.export.model_folder import is_read_by_timm, write_model_folder
from mimkd_ray.export.onnx_file import newest_opset
from mimkd_ray.models.build_model import build_model, model_names
from mimkd_ray.models.published_input import published_input
from mimkd_ray.recipes import CIFAR_MEAN
from mimkd_ray.train.records.run_files import OF_AN_EXPORT, is_ours

for package in ("onnx", "onnxruntime", "onnxscript", "torchao"):
    pytest.importorskip(package)

QUICK = ("--images", "150", "--calibration", "40", "--threads", "1", "--int8-drop", "5")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    """The formats of the run's student that are made by default; what was said is beside them."""
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()) as told:
        assert main(["export", str(run), *QUICK]) == 0
    (run / "said.txt").write_text(said.getvalue())
    (run / "told.txt").write_text(told.getvalue())
    return run / "export"


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports that measure no times, each of which takes most of a second."""
    monkeypatch.setattr(examine, "latency_ms", lambda *_: {"1": 1.0, "32": 1.0})


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _images() -> Tensor:
    """Normalised held-out digits, by hand."""
    data = tiny_config().data
    rows = open_data(data).val.read(range(40))
    pixels = torch.stack([torch.from_numpy(np.asarray(row.image)) for row in rows]).permute(0, 3, 1, 2).float()
    return (pixels / 255 - 0.305) / 0.376


def _student(run: Path) -> nn.Module:
    student = build_model("cifar/resnet8_w4", 10)
    student.load_state_dict(load_file(run / "student.safetensors"))
    return student.eval()


def _report(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "export.json").read_text())
    return value


ALONE = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
images = numpy.load(sys.argv[2])
some = [session.run(None, {"images": part})[0] for part in (images[:1], images[1:8], images[8:])]
assert "torch" not in sys.modules
numpy.save(sys.argv[3], numpy.concatenate(some))
"""


def test_onnx_runs_in_a_process_without_torch_at_any_batch_size(run: Path, exported: Path, tmp_path: Path) -> None:
    images = _images()
    np.save(tmp_path / "images.npy", images.numpy())
    arguments = [str(exported / "student.onnx"), str(tmp_path / "images.npy"), str(tmp_path / "logits.npy")]
    subprocess.run([sys.executable, "-c", ALONE, *arguments], check=True)
    with torch.no_grad():
        expected = _student(run)(images).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-4)


def test_pt2_and_the_model_folder_are_the_student(run: Path, exported: Path) -> None:
    images, student = _images(), _student(run)
    with torch.no_grad():
        expected = student(images)
        again = torch.export.load(exported / "student.pt2").module()(images)
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=0)
    made = build_model(f"local-dir:{exported}", 10, "published")
    takes = published_input(f"local-dir:{exported}")
    assert takes is not None
    assert (takes.size, takes.mean) == (8, (0.305, 0.305, 0.305))
    assert type(made) is type(student)
    for name, value in build_model("cifar/resnet8_w4", 10, f"local-dir:{exported}").state_dict().items():
        assert torch.equal(value, student.state_dict()[name])
        assert torch.equal(value, made.state_dict()[name])


def test_onnx_has_the_newest_operators_that_its_runtime_has(exported: Path) -> None:
    import onnx

    (operators,) = onnx.load(exported / "student.onnx").opset_import
    assert (operators.domain, operators.version) == ("", newest_opset())
    assert 21 < newest_opset() <= onnx.defs.onnx_opset_version()


def test_int8_holds_int8_weights_and_the_better_one_is_kept(exported: Path) -> None:
    import onnx
    from onnx import TensorProto

    report = _report(exported)
    kept = report["int8"]["kept"]
    assert {"onnxruntime", "onnxruntime_narrow", "pt2e"} <= set(report["int8"])
    assert report["files"]["int8"]["file"] == ("student_int8.pt2" if kept == "pt2e" else "student_int8.onnx")
    assert len(list(exported.glob("student_int8.*"))) == 1
    if kept != "pt2e":
        model = onnx.load(exported / "student_int8.onnx")
        heavy = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 4]
        assert heavy
        assert {tensor.data_type for tensor in heavy} == {TensorProto.INT8}


def test_narrow_weights_cannot_overflow_two_products_in_16_bits(exported: Path, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto
    from onnx.numpy_helper import to_array

    images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    quantize_onnx(exported / "student.onnx", [images], tmp_path / "x.onnx", narrow=True)
    tensors = onnx.load(tmp_path / "x.onnx").graph.initializer
    heavy = [to_array(tensor) for tensor in tensors if tensor.data_type == TensorProto.INT8 and len(tensor.dims) > 1]
    assert heavy
    assert max(int(abs(value.astype(int)).max()) for value in heavy) * 2 * 255 < 2**15


def test_the_report_has_the_figures(run: Path, exported: Path) -> None:
    report = _report(exported)
    assert {path.name for path in exported.iterdir()} <= set(OF_AN_EXPORT)
    assert set(report["files"]) == {"onnx", "pt2", "int8"}
    assert report["failed"] == {}
    student = _student(run)
    assert report["parameters"] == sum(p.numel() for p in student.parameters())
    assert report["macs"] == _multiply_adds(student, 8)
    for each in (report["student"], *report["files"].values()):
        assert each["bytes"] == (exported / each["file"]).stat().st_size
        assert all(each["latency_ms"][batch] > 0 for batch in ("1", "32"))
    for name in ("onnx", "pt2"):
        assert report["files"][name]["max_logit_difference"] <= 1e-3
        assert (report["files"][name]["agreement"], report["files"][name]["top1"]) == (100, report["student"]["top1"])


def _multiply_adds(model: nn.Module, side: int) -> int:
    """Counted layer by layer."""
    counts = []

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            counts.append(output.numel() * module.in_channels // module.groups * height * width)  # type: ignore[operator]
        elif isinstance(module, nn.Linear):
            counts.append(output.numel() * module.in_features)

    for module in model.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, side, side))
    return sum(counts)


def test_every_phase_says_that_it_begins(run: Path, exported: Path) -> None:
    first = ["loading PyTorch", "exporting cifar/resnet8_w4: reading it and its images"]
    steps = [f"writing and comparing {name}" for name in ("model folder", "onnx", "pt2", "int8", "int8 by onnxruntime")]
    told = (run / "told.txt").read_text().splitlines()
    assert [line for line in told if line in {*first, *steps}] == [*first, *steps]


def test_a_student_at_chance_and_int8_that_gains_little_are_said(run: Path, exported: Path) -> None:
    report = _report(exported)
    *chance, line = report["warnings"]
    said, top1, count = (run / "said.txt").read_text(), report["student"]["top1"], report["images"]["compared"]
    assert len(chance) == (top1 <= 10 + 200 * (0.1 * 0.9 / count) ** 0.5), "ten classes"
    assert (f" export: the student's top-1, {top1:.2f} % of {count} images, is that of chance" in said) == len(chance)
    assert said.endswith(f" export: {line}\n")
    smaller = report["student"]["bytes"] / report["files"]["int8"]["bytes"]
    size = f"{smaller:.1f} times smaller than" if smaller >= 1 else f"{1 / smaller:.1f} times as large as"
    assert line.startswith(f"{report['files']['int8']['file']} is {size} the weights at")


def test_a_quantiser_that_fails_beside_another(
    run: Path, untimed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("more than one output node")

    monkeypatch.setattr(export_student, "quantize_pt2", broken)
    assert main(["export", str(run), *QUICK, "--out", str(tmp_path), "--formats", "int8"]) == 0
    report = _report(tmp_path)
    assert report["failed"] == {}
    assert report["int8"]["pt2e"].startswith("not made: cifar/resnet8_w4 cannot be exported: ValueError: more than one")
    assert f"; pt2e {report['int8']['pt2e']}; kept: onnxruntime" in capsys.readouterr().out


def test_no_file_names_folders_of_this_machine(run: Path, exported: Path) -> None:
    for path in exported.iterdir():
        content = path.read_bytes()
        assert str(ROOT).encode() not in content, path
        assert str(run.parent).encode() not in content, path


def test_the_card_is_read_by_the_hubs_own_client(run: Path, exported: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(exported / "README.md")
    (result,) = card.data.eval_results
    ran = json.loads((run / "result.json").read_text())
    assert result.metric_value == round(ran["student"]["top1"], 2)
    assert (result.task_type, result.dataset_name) == ("image-classification", "digits")
    assert f"Distilled from `cifar/resnet8` (top-1 {ran['teacher']['top1']:.2f} %)" in card.text
    assert "python jobs/cifar100.py --config training_config.json" in card.text
    saved = json.loads((exported / "training_config.json").read_text())
    assert saved["train"]["lane_batch"] == 10


def test_an_export_belongs_to_its_run() -> None:
    assert all(is_ours(f"export/{name}") and is_ours(f"mimkd-seed01/export/{name}") for name in OF_AN_EXPORT)
    assert not is_ours("export/mine.txt")


def test_normalisation_inside_without_torchao_and_files_of_an_earlier_export(
    run: Path, untimed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    monkeypatch.setitem(sys.modules, "torchao", None)
    (tmp_path / "student.pt2").write_bytes(b"of an earlier export")
    (tmp_path / "export.json").write_text("{}")
    (tmp_path / "mine.txt").write_bytes(b"mine")
    arguments = ["export", str(run), *QUICK, "--out", str(tmp_path), "--formats", "int8", "--normalize", "true"]
    assert main(arguments) == 0
    assert "; pt2e not tried: torchao is not installed; kept: onnxruntime" in capsys.readouterr().out
    assert not (tmp_path / "student.pt2").exists()
    assert (tmp_path / "mine.txt").exists()
    images = _images()
    session = onnxruntime.InferenceSession(str(tmp_path / "student.onnx"))
    (logits,) = session.run(None, {"images": (images * 0.376 + 0.305).numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, _student(run)(images).numpy(), atol=1e-4)


def test_a_run_on_s3(run: Path, untimed: None, bucket: str) -> None:
    from mimkd_ray import storage

    for name in ("config.json", "student.safetensors", "result.json", "metrics.jsonl"):
        storage.upload(run / name, f"{bucket}/runs/tiny/{name}")
    assert main(["export", f"{bucket}/runs/tiny", *QUICK, "--formats", "pt2"]) == 0
    names = {url.rpartition("/")[2] for url in storage.list_files(f"{bucket}/runs/tiny/export")}
    assert names == {
        "README.md",
        "config.json",
        "export.json",
        "model.safetensors",
        "student.pt2",
        "training_config.json",
    }


def test_timm_reads_a_student_of_timm(untimed: None, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    weights = tmp_path / "lcnet.safetensors"
    from safetensors.torch import save_file

    net = timm.create_model("lcnet_035", num_classes=10).eval()
    save_file(net.state_dict(), weights)
    out = tmp_path / "out"
    student = ("--network", "timm/lcnet_035", "--weights", str(weights), "--data.root", "digits")
    size = ("--data.image-size", "32", "--data.pipeline", "none", "--out", str(out))
    assert main(["export", *student, *size, *QUICK, "--formats", "pt2"]) == 0
    made = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(made(images), net(images))
    assert tuple(made.pretrained_cfg["mean"]) == (0.485, 0.456, 0.406)
    assert tuple(made.pretrained_cfg["input_size"]) == (3, 32, 32)


def test_resnets_and_densenets_of_torchvision_are_those_of_timm() -> None:
    timm = pytest.importorskip("timm")
    names = [name for name in model_names() if is_read_by_timm(name) and name != "mobilenet_v2"]
    assert len(names) == 14
    assert all(map(timm.is_model, names))
    for name in ("resnet50", "densenet121"):
        with torch.device("meta"):
            ours, theirs = build_model(name, 10), timm.create_model(name, num_classes=10)
        assert _shapes(ours) == _shapes(theirs), name


@pytest.mark.parametrize(("name", "made_by"), [("resnet18", "ResNet"), ("mobilenet_v2", "EfficientNet")])
def test_timm_reads_a_student_of_torchvision(name: str, made_by: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    net = build_model(name, 10)
    images = torch.rand(4, 3, 64, 64)
    net.train()(images)  # each batch norm gets statistics of its own
    net.eval()
    write_model_folder(net, replace(tiny_config().data, image_size=64), (), 10, tmp_path)
    place = f"local-dir:{tmp_path}"
    again = build_model(place, 10, "published").eval()
    assert type(again) is type(net)
    made = timm.create_model(place, pretrained=True).eval()
    assert type(made).__name__ == made_by
    with torch.no_grad():
        assert torch.equal(again(images), net(images))
        assert net(images).std() > 0.01
        torch.testing.assert_close(made(images), net(images))


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def test_a_cifar_student_without_a_run_has_the_images_of_its_protocol(untimed: None, tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    torch.save(build_model("cifar/resnet8_w4", 10).state_dict(), weights)
    student = ("--network", "cifar/resnet8_w4", "--weights", str(weights), "--data.root", "digits")
    assert main(["export", *student, *QUICK, "--out", str(tmp_path / "out"), "--formats", "pt2"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["pretrained_cfg"]["mean"] == list(CIFAR_MEAN)


def test_layers_that_share_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    vars(model)["zoo_name"] = "my.networks:tied"
    write_model_folder(model, tiny_config().data, (), 4, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in model.state_dict().items()
    }
