"""`evaluate` on sets as they are downloaded: class folders alone, folders that are numbers; and without labels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from page_reader import Reader
from PIL import Image
from safetensors.torch import save_file
from tiny_run import tiny_config
from torchvision.datasets import ImageFolder

import mimkd_ray
from mimkd_ray import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    TeacherConfig,
    UserError,
    evaluate_run,
    mutual_information,
)
from mimkd_ray.cli.evaluate import table
from mimkd_ray.cli.local_launch import LocalContext
from mimkd_ray.config.form.json_form import to_dict
from mimkd_ray.config.jobs.evaluate import evaluate_job
from mimkd_ray.data.augment.decode import decode
from mimkd_ray.data.augment.pipelines import make_pipeline
from mimkd_ray.data.sources.digits import DigitsSource
from mimkd_ray.evaluation.measure import measure
from mimkd_ray.evaluation.predictions import ece, fit_temperature, reliability
from mimkd_ray.models.build_model import build_model
from mimkd_ray.pages.write_pages import write_report
from mimkd_ray.train.held_out.neighbours import knn_accuracy
from mimkd_ray.train.networks.student_module import Normalizer
from mimkd_ray.train.records.read_run import read_run

CLASSES = 12
NAMES = [f"n{number:02d}" for number in range(CLASSES)]
NUMBERS = [str(number) for number in range(CLASSES)]
FAST = EvaluateConfig(tap_rows=0)


def folders(root: Path, names: list[str], first: int, rows: int) -> Path:
    """Digits in class folders: those of a digit's class, and every seventh in one of two more."""
    source = DigitsSource("val" if first < 0 else "train")
    for row in source.read(range(abs(first) - (first < 0), abs(first) + rows)):
        place = root / names[10 + row.id % 2 if row.id % 7 == 0 else row.label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row.image).save(place / f"{row.id}.png")
    return root


def as_run(place: Path, **sections: Any) -> Path:
    """The directory of a run: its config and a student."""
    config = tiny_config(**sections)
    place.mkdir()
    (place / "config.json").write_text(json.dumps(to_dict(config)))
    torch.manual_seed(1)
    count = config.data.num_classes or CLASSES
    save_file(build_model(config.student.name, count).state_dict(), place / "student.safetensors")
    return place


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's own data: folders with names."""
    root = tmp_path_factory.mktemp("own")
    folders(root / "train", NAMES, 0, 200)
    folders(root / "val", NAMES, 200, 150)
    return root


@pytest.fixture(scope="module")
def run(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_run(tmp_path_factory.mktemp("runs") / "run", data={"root": str(own), "subset": 0}, loss={"name": ()})


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other images in folders 0 to 11, and no training split: the form of ImageNetV2."""
    return folders(tmp_path_factory.mktemp("numbered"), NUMBERS, 400, 150)


def by_hand(run: Path, root: Path, network: torch.nn.Module | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of the student, or another network, of a folder's images, and the numbers of their folders."""
    config = DataConfig()
    view = make_pipeline(config.pipeline, config.image_size).eval
    normalize = Normalizer(config.mean, config.std, torch.device("cpu"), torch.float32, channels_last=False)
    theirs = ImageFolder(str(root))
    images = torch.stack([view(decode(Path(file).read_bytes())) for file, _ in theirs.samples])
    labels = [int(theirs.classes[label].removeprefix("n")) for _, label in theirs.samples]
    model = network or build_model("cifar/resnet8_w4", CLASSES, str(run / "student.safetensors")).eval()
    with torch.no_grad():
        return model(normalize(images)), torch.tensor(labels)


def test_folders_that_are_numbers_are_the_networks_classes(run: Path, numbered: Path, tmp_path: Path) -> None:
    """0, 1, 10, 11, 2 ... is their order as text. By a run, by weights alone, and of a network."""
    logits, labels = by_hand(run, numbered)
    top1 = 100 * float((logits.argmax(1) == labels).double().mean())
    in_text = torch.tensor([sorted(NUMBERS).index(str(int(label))) for label in labels])
    assert top1 != 100 * float((logits.argmax(1) == in_text).double().mean())
    data = tiny_config(data={"root": str(numbered), "subset": 0}).data
    student = ModelConfig(name="cifar/resnet8_w4", weights=str(run / "student.safetensors"))
    settings = EvaluateConfig(tap_rows=0, out=str(tmp_path))
    for place, sections in ((str(run), {}), ("", {"student": student})):
        found = evaluate_run(place, settings, data=data, **sections)
        assert found["top1"] == pytest.approx(top1)
        assert [each["class"] for each in found["per_class"]] == NUMBERS
        table = pq.read_table(tmp_path / "predictions.parquet").to_pydict()
        assert sorted(table["prediction"]) == sorted(str(int(best)) for best in logits.argmax(1))
        assert json.loads((tmp_path / "evaluation.json").read_text()) == found
    assert found["knn"] is None, "there are no training images"
    model = build_model(student.name, CLASSES, student.weights)
    assert mimkd_ray.evaluate(model, data).top1 == pytest.approx(top1)


def test_class_folders_alone(run: Path, own: Path, numbered: Path, tmp_path: Path) -> None:
    """k-NN, probe and temperature are by the run's images, as they would be with these beside the evaluated."""
    together = tmp_path / "together"
    together.mkdir()
    (together / "train").symlink_to(own / "train")
    (together / "val").symlink_to(folders(tmp_path / "named", NAMES, 400, 150))
    settings = EvaluateConfig(tap_rows=0, out=str(tmp_path))
    alone, beside = (
        evaluate_run(str(run), settings, data=tiny_config(data={"root": str(root), "subset": 0}).data)
        for root in (numbered, together)
    )
    assert (alone["rows"], alone["top1"]) == (150, pytest.approx(beside["top1"]))
    assert alone["knn"] == pytest.approx(beside["knn"])
    assert alone["linear_probe"] == pytest.approx(beside["linear_probe"])
    assert alone["calibration"]["fitted_on"] == "150 images that the run held out"
    temperature = fit_temperature(*by_hand(run, own / "val"))
    assert alone["calibration"]["temperature"] == pytest.approx(temperature, rel=1e-3)
    logits, labels = by_hand(run, numbered)
    assert alone["calibration"]["ece_scaled"] == pytest.approx(ece(reliability(logits.double() / temperature, labels)))


def test_a_temperature_of_held_out_training_images(own: Path, tmp_path: Path) -> None:
    """A run with a holdout, on its validation split; on the holdout itself there are no others. And the page's images
    of class folders alone."""
    place = as_run(tmp_path / "run", data={"root": str(own), "subset": 0, "holdout": 0.25}, loss={"name": ()})
    data = read_run(str(place)).config.data
    settings = EvaluateConfig(tap_rows=0, train_rows=0)
    found = evaluate_run(str(place), settings, data=replace(data, holdout=0.0))
    assert (found["rows"], found["calibration"]["fitted_on"]) == (150, "50 images that the run held out")
    found = evaluate_run(str(place), settings)
    assert (found["rows"], found["calibration"]["fitted_on"]) == (50, "the other half of the images")
    evaluate_run(str(place), settings, data=replace(data, root=str(own / "val")))
    page = Path(write_report(str(place))).read_text()
    assert page.count("<img") == 24, "the worst images"


@pytest.mark.parametrize("section", ["student", "train"])
def test_the_student_is_the_runs_own(section: str, own: Path, numbered: Path, tmp_path: Path) -> None:
    """Also of a run that began from a file, which is in its config, and of one in float64."""
    torch.manual_seed(7)
    save_file(build_model("cifar/resnet8_w4", CLASSES).state_dict(), tmp_path / "start.safetensors")
    fields = {"student": {"weights": str(tmp_path / "start.safetensors")}, "train": {"precision": "float64"}}
    place = as_run(
        tmp_path / "run", data={"root": str(own), "subset": 0}, loss={"name": ()}, **{section: fields[section]}
    )
    settings = EvaluateConfig(tap_rows=0, train_rows=0, out=str(tmp_path))
    found = evaluate_run(str(place), settings, data=tiny_config(data={"root": str(numbered), "subset": 0}).data)
    logits, labels = by_hand(place, numbered)
    assert found["weights"] == str(place / "student.safetensors")
    assert found["top1"] == pytest.approx(100 * float((logits.argmax(1) == labels).double().mean()))
    assert found["calibration"]["fitted_on"] == "150 images that the run held out"


def test_an_arm_has_the_teacher_of_its_comparison(own: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    teacher = build_model("cifar/resnet8", CLASSES).eval()
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    whole = as_run(tmp_path / "c", data={"root": str(own), "subset": 0}, compare={"seeds": 2})
    (whole / "teacher.json").write_text(json.dumps({"weights": str(tmp_path / "teacher.safetensors")}))
    arm = as_run(whole / "mimkd-seed00", data={"root": str(own), "subset": 0})
    with pytest.raises(UserError, match=f"is a comparison of several runs: name one of them, such as {arm}"):
        evaluate_run(str(whole))
    found = evaluate_run(str(arm), EvaluateConfig(tap_rows=0, train_rows=0))
    guesses = [by_hand(arm, own / "val", network)[0].argmax(1) for network in (None, teacher)]
    same = 100 * float((guesses[0] == guesses[1]).double().mean())
    assert found["teacher"]["agreement"] == pytest.approx(same)
    tap = {"teacher": "a", "student": "b", "nats": 1.5, "ceiling": 4.0, "cka": None}
    assert "a - b: 1.50 of at most 4.00 nats, CKA unknown" in table(found | {"taps": [tap]})


def test_batches_without_an_image() -> None:
    with pytest.raises(UserError, match=r"the iterable gave no images .*: give batches of images"):
        mimkd_ray.evaluate(build_model("cifar/resnet8_w4", 10), iter(()))


def test_no_evaluated_image_is_its_own_neighbour(run: Path, own: Path, tmp_path: Path) -> None:
    """The run's training images, as its split and as folders alone: each by the others, and no probe of what it saw."""
    base = read_run(str(run)).config
    for data in ({"val_split": "train"}, {"root": str(own / "train")}):
        job = evaluate_job(tiny_config(data={"root": str(own), "subset": 0, **data}, loss={"name": ()}), eval=FAST)
        found = measure(job, LocalContext(torch.device("cpu")), str(run), base)
        features, labels = found.rows.taps[0][found.subject.vector], found.rows.labels_N
        expected = knn_accuracy(features, labels, features, labels, leave_one_out=True)
        assert found.figures["knn"] == pytest.approx(expected)
        assert expected < knn_accuracy(features, labels, features, labels)
        assert found.figures["linear_probe"] is None


def test_a_run_whose_own_data_cannot_be_read(own: Path, numbered: Path, tmp_path: Path) -> None:
    """Names of the head are then needed, and give all but what takes the run's images."""
    place = as_run(tmp_path / "run", data={"root": str(tmp_path / "gone"), "subset": 0}, loss={"name": ()})
    data = tiny_config(data={"root": str(own / "val"), "subset": 0}).data
    with pytest.raises(UserError, match=r"its classes are, and cannot be read: .*gone.*--eval.classes FILE"):
        evaluate_run(str(place), FAST, data=data)
    (tmp_path / "names").write_text("\n".join(NAMES))
    found = evaluate_run(str(place), EvaluateConfig(tap_rows=0, classes=str(tmp_path / "names")), data=data)
    logits, labels = by_hand(place, own / "val")
    assert found["top1"] == pytest.approx(100 * float((logits.argmax(1) == labels).double().mean()))
    assert (found["knn"], found["calibration"]["fitted_on"]) == (None, "the other half of the images")


def label_free(place: Path, root: Path, labels: str, **sections: Any) -> tuple[dict[str, Any], str]:
    """Evaluate a run of such labels; return the figures, and the text of its report."""
    data = {"root": str(root), "subset": 0, "labels": labels, "num_classes": CLASSES}
    run = as_run(place, data=data, **sections)
    found = evaluate_run(str(run))
    return found, Reader(Path(write_report(str(run))).read_text()).text


def test_without_any_label(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        (tmp_path / "bare" / split).mkdir(parents=True)
        for number, file in enumerate(sorted((own / split).rglob("*.png"))):
            (tmp_path / "bare" / split / f"{number}.png").symlink_to(file)
    found, page = label_free(tmp_path / "run", tmp_path / "bare", "none", loss={"kd_weight": 1.0})
    assert [found[key] for key in ("labelled", "top1", "calibration", "knn")] == [0, None, None, None]
    assert "top-1 unknown, as no image has a label" in capsys.readouterr().out
    assert "No image has a label and a prediction." in page


def test_a_head_that_nothing_has_trained(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels that are there judge its features, and not its predictions; after KD also these."""
    found, page = label_free(tmp_path / "features", own, "none")
    assert [found[key] for key in ("labelled", "top1", "top5", "calibration")] == [150, None, None, None]
    assert (found["per_class"], found["confusions"]) == ([], [])
    assert 0 < found["knn"] <= 100
    assert set(pq.read_table(tmp_path / "features" / "predictions.parquet").to_pydict()["prediction"]) == {None}
    assert "top-1 unknown, as nothing has trained the head" in capsys.readouterr().out
    assert "other data" not in page
    taught, page = label_free(tmp_path / "taught", own, "none", loss={"kd_weight": 1.0})
    assert taught["top1"] is not None
    assert taught["knn"] == found["knn"]
    not_taught, _ = label_free(tmp_path / "other", own, "none", loss={"kd_weight": 1.0}, teacher={"classes": 5})
    assert not_taught["top1"] is None, "KD is off with a teacher of other classes"
    save_file(build_model("cifar/resnet8", 5).state_dict(), tmp_path / "of 5.safetensors")
    teacher = TeacherConfig(name="cifar/resnet8", weights=str(tmp_path / "of 5.safetensors"), classes=5)
    settings = EvaluateConfig(network="teacher", out=str(tmp_path / "teacher"))
    of_teacher = evaluate_run(str(tmp_path / "other"), settings, teacher=teacher)
    assert of_teacher["top1"] is None
    assert of_teacher["knn"] > 0
    assert "top-1 unknown, as its head is of other classes" in capsys.readouterr().out
    assert "other data" not in page


def test_labels_of_a_part(own: Path, tmp_path: Path) -> None:
    """No training image of the last two classes has a label, so that the data has no name of them."""
    for split, end in (("train", 10), ("validation", CLASSES)):
        theirs = ImageFolder(str(own / split[:5].replace("valid", "val")))
        image = [{"bytes": Path(file).read_bytes(), "path": None} for file, _ in theirs.samples]
        label = [label if label < end else None for _, label in theirs.samples]
        (tmp_path / "set").mkdir(exist_ok=True)
        table = pa.table({"image": image, "label": pa.array(label, pa.int64())})
        pq.write_table(table, tmp_path / "set" / f"{split}-0.parquet")
    found, page = label_free(tmp_path / "run", tmp_path / "set", "partial")
    logits, labels = by_hand(tmp_path / "run", own / "val")
    assert found["top1"] == pytest.approx(100 * float((logits.argmax(1) == labels).double().mean()))
    assert found["knn"] is not None
    assert "The images are not shown" not in page


def test_critics_learn_on_one_half_and_are_read_on_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(3)
    save_file(build_model("cifar/resnet8", 10).state_dict(), tmp_path / "teacher.safetensors")
    config = tiny_config(teacher={"weights": str(tmp_path / "teacher.safetensors")})
    context = LocalContext(torch.device("cpu"))
    found = measure(evaluate_job(config, eval=EvaluateConfig(rows=128, train_rows=0)), context)
    tap = found.figures["taps"][0]
    of_teacher, of_student = (found.rows.taps[n][tap[role]] for n, role in ((1, "teacher"), (0, "student")))
    half, quarter = (
        mutual_information(of_teacher, of_student, epochs=20, batch=32, held_out=share) for share in (0.5, 0.25)
    )
    assert tap["nats"] == half.nats != quarter.nats
    assert measure(evaluate_job(config, eval=EvaluateConfig(rows=127, train_rows=0)), context).figures["taps"] == []
    assert "mutual information and CKA take 128 images, and 127 are given: left out" in capsys.readouterr().out
