"""report.html of a run: its figures are those of the run's files, names are text, and nothing is asked of a server."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluated import CLASSES, EVIL, write_evaluation
from page_reader import Reader
from PIL import Image
from plotly.offline import get_plotlyjs
from tiny_run import run_tiny, tiny_config

from mimkd_ray.__main__ import main
from mimkd_ray.cli import training
from mimkd_ray.data.sources.digits import DigitsSource
from mimkd_ray.errors import UserError
from mimkd_ray.pages import page as shell
from mimkd_ray.pages.run_records import weights_size
from mimkd_ray.pages.write_pages import write_report
from mimkd_ray.train.records.run_files import is_ours

SAID = (("prediction", "probability"), ("teacher_prediction", "teacher_probability"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of its own, as it ends."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    run_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(plain: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The same run, evaluated."""
    folder = plain.parent / "evaluated"
    shutil.copytree(plain, folder)
    return folder, write_evaluation(folder)


@pytest.fixture(autouse=True)
def _named_by_somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    """One class of the digits has a name that is markup."""
    begin = DigitsSource.__init__

    def begun(self: DigitsSource, role: str) -> None:
        begin(self, role)  # type: ignore[arg-type]
        self.classes = tuple(CLASSES)

    monkeypatch.setattr(DigitsSource, "__init__", begun)


def page_of(folder: Path) -> Reader:
    return Reader(Path(write_report(str(folder))).read_text())


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def test_curves_are_those_of_the_metrics_file(plain: Path) -> None:
    page = page_of(plain)
    train, evals = lines(plain, "train"), lines(plain, "eval")
    epochs = [line["epoch"] for line in train]
    assert page.lines("Loss")["total"] == (epochs, [line["loss"] for line in train])
    assert page.lines("Held-out accuracy")["top-1"] == ([1, 2], [line["top1"] for line in evals])
    assert page.lines("Learning rate")["learning rate"][1] == [line["lr"] for line in train]
    waiting = page.lines("Speed")["waiting for data (%)"][1]
    assert waiting == pytest.approx([100 * line["data_wait"] for line in train])
    term = "feature/stage3-stage3"
    for title, source in (("Information, in training", train), ("Information, held out", evals)):
        drawn = page.lines(title)
        assert drawn[term][1] == [line[f"{term}/nats"] for line in source]
        assert drawn[f"ceiling of {term}"][1] == [line[f"{term}/ceiling"] for line in source]
    scales = [line[f"{term}/scale"] for line in train]
    assert page.lines("Temperature of the critics")[term][1] == pytest.approx([1 / scale for scale in scales])


def test_curves_of_a_head_that_nothing_trains_are_left_out(tmp_path: Path) -> None:
    run_tiny(tmp_path / "run", data={"labels": "none"}, train={"epochs": 1})
    page, (found,) = page_of(tmp_path / "run"), lines(tmp_path / "run", "eval")
    assert page.lines("Held-out accuracy")["k-NN top-1"] == ([1], [found["knn"]])
    assert "top-1" not in page.lines("Held-out accuracy")
    assert set(page.lines("Loss")) == {"total"}
    assert "cross-entropy" not in page.text
    assert "top-5" not in page.text


def test_the_headline_says_what_was_won(plain: Path) -> None:
    result = json.loads((plain / "result.json").read_text())
    text = page_of(plain).text
    assert "cifar/resnet8_w4 taught by cifar/resnet8" in text
    assert f"{result['student']['top1']:.2f} %" in text
    assert f"{result['teacher']['top1']:.2f} %" in text
    assert "mimkd-ray evaluate adds" in text
    assert f"mimkd-ray train --config '{plain}/config.json' --run.name 'a run-again'" in text
    assert result["machine"]["device"] == "CPU"
    assert result["machine"]["system"] == platform.platform()
    for name, value in (*result["versions"].items(), *result["machine"].items()):
        assert f"{name}\n{value}" in text
    assert json.dumps(json.loads((plain / "config.json").read_text()), indent=2) in text


def test_the_headline_has_size_and_latency_of_an_export(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "run")
    files = {
        name: {"latency_ms": {"1": ms}, "bytes": size} for name, ms, size in (("onnx", 4.1, 5e6), ("int8", 2, 2e6))
    }
    report = {"student": {"latency_ms": {"1": 7.25}, "bytes": 5.1e6}, "files": files, "macs": 12_345_678, "threads": 2}
    (tmp_path / "run" / "export").mkdir()
    (tmp_path / "run" / "export" / "export.json").write_text(json.dumps(report))
    text = page_of(tmp_path / "run").text
    assert "12.3 M\nmultiply-adds an image" in text
    assert "2.00 ms\nan image, batch 1, 2 threads, exported as int8" in text
    assert "export, PyTorch\n7.25 ms, 5.10 MB\nexport, onnx\n4.10 ms, 5.00 MB\nexport, int8\n2.00 ms, 2.00 MB" in text


def test_the_size_counts_parameters_without_running_statistics(plain: Path) -> None:
    from mimkd_ray.models.build_model import build_model

    model = build_model("cifar/resnet8_w4", 10)
    file = plain / "student.safetensors"
    assert weights_size(str(file)) == (sum(p.numel() for p in model.parameters()), file.stat().st_size)
    assert weights_size(str(plain / "config.json")) is None
    damaged = plain.parent / "damaged.safetensors"
    damaged.write_bytes(b"\xff" * 20)
    assert weights_size(str(damaged)) is None
    assert weights_size(str(plain / "missing.safetensors")) is None


def test_classes_confusions_and_calibration(evaluated: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, rows = evaluated
    page = page_of(folder)
    names = "curves evaluation classes agreement confusions calibration corruptions worst again"
    assert page.sections == names.split()
    assert "same answer as the teacher\n71.50 %\nKL from the teacher\n0.31 nats" in page.text
    (bars,) = page.figure("Per class")["data"]
    gains = {}
    for name in CLASSES:
        own = [row for row in rows if row["label"] == name]
        student, teacher = (sum(row[key] == name for row in own) for key in ("prediction", "teacher_prediction"))
        gains[name.replace("<", "&lt;").replace(">", "&gt;")] = 100 * (student - teacher) / len(own)
    assert dict(zip(bars["hovertext"], bars["x"], strict=True)) == pytest.approx(gains)
    diagonal, student = page.figure("Accuracy by confidence")["data"]
    assert diagonal["x"] == diagonal["y"] == [0, 1]
    assert student["y"] == pytest.approx([0.8 * x for x in student["x"]])
    assert "0.0812" in page.text


def test_worst_images_are_those_that_it_is_most_certain_about(evaluated: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, rows = evaluated
    page = page_of(folder)
    wrong = sorted((r for r in rows if r["prediction"] != r["label"]), key=lambda r: -r["probability"])[:24]
    pictures = [str(attrs["src"]) for tag, attrs in page.elements if tag == "img"]
    assert len(pictures) == 24
    stored = DigitsSource("val").read([row["id"] for row in wrong])
    for picture, image in zip(pictures, stored, strict=True):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.partition("base64,")[2]))))
        assert np.array_equal(shown, image.image)
    for row in wrong:
        said = [f" {row[who]} {row[how]:.0%}" for who, how in SAID]
        assert (
            "\n".join([f" {row['label']}", "student", said[0], "teacher", said[1], "id", f" {row['id']}"]) in page.text
        )


def test_names_are_text_and_only_the_two_scripts_may_run(evaluated: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = evaluated
    place = Path(write_report(str(folder)))
    assert is_ours(place.name)
    assert place.stat().st_size < 4_000_000
    page = Reader(place.read_text())
    assert EVIL in page.text
    assert not re.search(r"(<|\\u003c)script", page.packed("figures"))
    for tag, attrs in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert not any(name.startswith("on") for name in attrs)
        assert str(attrs.get("src") or "data:").startswith("data:")
        assert str(attrs.get("href") or "#").startswith("#")
    policy = next(str(attrs["content"]) for tag, attrs in page.elements if tag == "meta" and "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    own = [text for attrs, text in page.scripts if not attrs]
    assert len(own) == 1
    assert page.packed("plotly") == get_plotlyjs()
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (*own, get_plotlyjs())]
    assert allowed == digests


def test_an_evaluation_makes_the_page_again(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(plain, folder)
    assert main(["evaluate", str(folder), "--eval.train-rows", "0"]) == 0
    page = Reader((folder / "report.html").read_text())
    figures = json.loads((folder / "evaluation.json").read_text())
    assert f"top-1 (%)\n{figures['top1']:.2f}" in page.text
    for each in figures["per_class"]:
        assert f"{each['class']}\n{each['rows']}\n{each['top1']:.2f}" in page.text
    _, student = page.figure("Accuracy by confidence")["data"]
    assert student["x"] == [each["confidence"] for each in figures["calibration"]["bins"]]
    assert len([tag for tag, _ in page.elements if tag == "img"]) == 24


def test_images_of_other_data_are_not_shown(evaluated: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    shutil.copytree(evaluated[0], tmp_path / "other")
    write_evaluation(tmp_path / "other", source=DigitsSource("train"))
    page = page_of(tmp_path / "other")
    assert "the evaluation was of other data than can be read here" in page.text
    assert not [tag for tag, _ in page.elements if tag == "img"]


def test_a_teacher_whose_top1_is_not_known(plain: Path, tmp_path: Path) -> None:
    """It has classes of its own, or no image has a label."""
    shutil.copytree(plain, tmp_path / "run")
    known = json.loads((plain / "teacher.json").read_text())
    (tmp_path / "run" / "teacher.json").write_text(json.dumps(known | {"top1": None}))
    page = page_of(tmp_path / "run")
    assert "top-1 of the student" in page.text
    assert "top-1 of the teacher" not in page.text
    assert list(page.lines("Held-out accuracy")) == ["top-1", "top-5"]


def test_a_run_that_has_not_ended(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "begun")
    for name in ("result.json", "student.safetensors"):
        (tmp_path / "begun" / name).unlink()
    page = page_of(tmp_path / "begun")
    assert "has not come to its end: it is at step 6" in page.text
    (tmp_path / "begun" / "metrics.jsonl").unlink()
    assert "No step has been logged." in page_of(tmp_path / "begun").text


def test_secrets_of_an_earlier_release_are_left_out(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "run")
    config = json.loads((plain / "config.json").read_text())
    config["teacher"]["weights"] = "https://me:hunter2@host/w.pth?sig=abcdef"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    page = page_of(tmp_path / "run")
    assert "hunter2" not in page.text
    assert "abcdef" not in page.text
    assert "give those URLs again" in page.text


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not the directory of a run: it has no config\.json"):
        write_report(str(tmp_path))


def test_a_run_makes_its_page_and_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = {"root": str(tmp_path), "name": "one"}
    result = training.run(tiny_config(run=place))
    assert result["student"]["name"] in (tmp_path / "one" / "report.html").read_text()

    def broken() -> str:
        raise RuntimeError("no\nplotly")

    monkeypatch.setattr("plotly.offline.get_plotlyjs", broken)
    monkeypatch.setattr("mimkd_ray.pages.page._plotly", shell._plotly.__wrapped__)
    again = training.run(tiny_config(run={**place, "name": "two"}))
    assert again["student"] == result["student"]
    assert not (tmp_path / "two" / "report.html").exists()
    (line,) = [record.getMessage() for record in caplog.records if "report.html" in record.getMessage()]
    assert "RuntimeError: no plotly" in line
    assert "\n" not in line
