"""`evaluate` as it is called: on a run, on a teacher, on weights, on other data, on bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_run import tiny_config

from mimkd_ray.__main__ import main
from mimkd_ray.cli.training import run, run_directory
from mimkd_ray.data.augment.decode import decode
from mimkd_ray.data.augment.pipelines import make_pipeline
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.models.build_model import build_model
from mimkd_ray.run_lock import held
from mimkd_ray.train.networks.student_module import Normalizer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run whose teacher has weights, and its result."""
    folder = tmp_path_factory.mktemp("evaluated")
    torch.manual_seed(3)
    weights = folder / "teacher.safetensors"
    save_file(build_model("cifar/resnet8", 10).state_dict(), weights)
    config = tiny_config(teacher={"weights": str(weights)}, run={"root": str(folder), "keep_best": True})
    result = run(config)
    return Path(run_directory(config)), result


def evaluate(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


FAST = ("--eval.train-rows", 60, "--eval.tap-rows", 0)


def test_a_run(finished: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    place, result = finished
    assert evaluate(place, "--eval.train-rows", 60, "--eval.tap-rows", 200, "--eval.corruptions", "true",
                    "--eval.corruption-rows", 40) == 0  # fmt: skip
    figures = json.loads((place / "evaluation.json").read_text())
    assert figures["top1"] == pytest.approx(result["student"]["top1"])
    assert figures["top5"] == pytest.approx(result["student"]["top5"])
    assert figures["teacher"]["top1"] == pytest.approx(result["teacher"]["top1"])
    assert sum(each["rows"] for each in figures["per_class"]) == figures["rows"]
    weighted = sum(each["rows"] * each["top1"] for each in figures["per_class"]) / figures["rows"]
    assert weighted == pytest.approx(figures["top1"])
    assert {tap["student"] for tap in figures["taps"]} == {"pool", "stage3"}
    assert all(0 <= tap["cka"] <= 1 and tap["nats"] <= tap["ceiling"] + 1e-6 for tap in figures["taps"])
    assert len(figures["corruptions"]) == 35
    assert 0 <= figures["knn"] <= 100
    assert 0 <= figures["linear_probe"] <= 100
    table = pq.read_table(place / "predictions.parquet").to_pydict()
    assert len(table["id"]) == figures["rows"]
    assert len(set(table["id"])) == figures["rows"]
    right = [label == guess for label, guess in zip(table["label"], table["prediction"], strict=True)]
    assert 100 * sum(right) / len(right) == pytest.approx(figures["top1"])
    same = [mine == its for mine, its in zip(table["prediction"], table["teacher_prediction"], strict=True)]
    assert 100 * sum(same) / len(same) == pytest.approx(figures["teacher"]["agreement"])
    assert table["label"] == [str(label) for label in open_data(tiny_config().data).val.labels()]
    said = capsys.readouterr().out.splitlines()
    phases = ["loading PyTorch", "opening data and networks", "evaluating", "features of training images"]
    assert [line for line in said if line in phases] == phases
    assert any(line.startswith(f"  top-1 {figures['top1']:.2f} %") for line in said)


def test_the_teacher_and_the_best_and_a_part(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    place, result = finished
    assert evaluate(place, "--eval.network", "teacher", "--eval.out", tmp_path, *FAST) == 0
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    assert figures["top1"] == pytest.approx(result["teacher"]["top1"])
    assert figures["teacher"] is None
    assert "teacher_prediction" not in pq.read_table(tmp_path / "predictions.parquet").column_names
    pairs = ("--loss.global-pairs", "pool:logits", "--eval.tap-rows", 128)  # logits are no layer
    part = ("--eval.network", "best", "--eval.rows", 130, "--eval.out", tmp_path, "--eval.train-rows", 0)
    assert evaluate(place, *part, *pairs) == 0
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    assert figures["rows"] == 130
    assert {(tap["teacher"], tap["student"]) for tap in figures["taps"]} == {("pool", "stage3"), ("stage3", "stage3")}


def test_data_with_some_of_the_classes(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Folders with names of some classes: the logits are among these, whatever their numbers there."""
    place, _ = finished
    data = open_data(tiny_config().data)
    wanted = (7, 3, 9)
    rows = [data.val.read([row])[0] for row in range(120)]
    for row in rows:
        if row.label in wanted:
            for split in ("train", "val"):
                folder = tmp_path / "set" / split / str(row.label)
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(row.image).save(folder / f"{row.id}.png")
    out = tmp_path / "out"
    flags = ("--data.root", tmp_path / "set", "--data.subset", 0, "--eval.out", out, *FAST)
    assert evaluate(place, *flags) == 0
    figures = json.loads((out / "evaluation.json").read_text())
    table = pq.read_table(out / "predictions.parquet").to_pydict()
    assert set(table["label"]) == {"3", "7", "9"}
    assert set(table["prediction"]) <= {"3", "7", "9"}
    assert figures["classes"] == 3
    model = build_model("cifar/resnet8_w4", 10, str(place / "student.safetensors")).eval()
    config = tiny_config().data
    kept = [row for row in rows if row.label in wanted]
    view = make_pipeline(config.pipeline, config.image_size).eval
    normalize = Normalizer(config.mean, config.std, torch.device("cpu"), torch.float32, channels_last=False)
    with torch.no_grad():
        logits = model(normalize(torch.stack([view(decode(row.image)) for row in kept])))[:, [3, 7, 9]]
    guesses = [(3, 7, 9)[int(best)] for best in logits.argmax(1)]
    expected = 100 * sum(guess == row.label for guess, row in zip(guesses, kept, strict=True)) / len(kept)
    assert figures["top1"] == pytest.approx(expected)


def test_weights_without_a_run(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    place, result = finished
    flags = ("--student.name", "cifar/resnet8_w4", "--student.weights", place / "student.safetensors",
             "--data.subset", 60, "--eval.out", tmp_path, *FAST)  # fmt: skip
    assert evaluate(*flags) == 0
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    assert figures["top1"] == pytest.approx(result["student"]["top1"])
    assert figures["teacher"] is None
    before = (tmp_path / "evaluation.json").read_bytes()
    with held(str(tmp_path), "evaluation.lock.json"):
        assert evaluate(*flags, "--eval.rows", 100) == 2
    assert (tmp_path / "evaluation.json").read_bytes() == before, "of an evaluation that writes at this moment"


def test_bad_input(finished: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, _ = finished

    def refused(*arguments: object, status: int = 2) -> str:
        capsys.readouterr()
        assert evaluate(*arguments) == status
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "has no config.json" in refused(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((place / "config.json").read_text())
    assert "has no student.safetensors and no checkpoint: let the run go on" in refused(empty)
    assert "has no best.safetensors" in refused(empty, "--eval.network", "best")
    (empty / "student.safetensors").write_bytes((place / "student.safetensors").read_bytes()[:500])
    assert "student.safetensors: not a readable safetensors file of 500 bytes" in refused(empty)
    (empty / "config.json").write_text("{")
    assert "config.json (1 bytes) is damaged" in refused(empty, status=1)
    for split in ("train", "val"):
        folder = tmp_path / "other" / split / "ape"
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "0.png")
    assert "none has the same name" in refused(place, "--data.root", tmp_path / "other", "--data.subset", 0)
    names = tmp_path / "names"
    assert "cannot be read (FileNotFoundError): give a text file" in refused(place, "--eval.classes", names)
    assert "cannot be read (IsADirectoryError): give a text file" in refused(place, "--eval.classes", tmp_path)
    for content, why in ((b"\xff", "(UnicodeDecodeError)"), (b"ape\n\nbee\n", "has 3 lines, and an empty one")):
        names.write_bytes(content)
        assert why in refused(place, "--eval.classes", names)
    assert "eval.rows is -1" in refused(place, "--eval.rows", -1)
    assert "nothing to evaluate: give the directory of a run, or" in refused("--data.subset", 60)
    untrained = ("--student.weights", "random", "--eval.out", tmp_path)
    assert "unknown model" in refused("--student.name", "cifar/resnet9", *untrained)
    wide = ("--student.name", "tiny_run:of_a_thousand")
    assert "gives 1000 logits, and the data has 10 classes" in refused(*wide, *untrained)
    assert "Not a directory; give a place in which" in refused(place, "--eval.out", names / "below")
    assert evaluate(place, "--eval.out", names / "below") == 2
    assert "evaluating" not in capsys.readouterr().out, "a place is tried before the images are passed"
    assert load_file(place / "student.safetensors"), "nothing of the run was touched"
