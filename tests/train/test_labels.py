"""Training without labels, or with those of a part of the images."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_run import cpu, run_tiny, tiny_config
from torch import Tensor

from mimkd_ray.cli.preflight import preflight
from mimkd_ray.config import LossConfig
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.data.sources.digits import DigitsSource
from mimkd_ray.errors import UserError
from mimkd_ray.losses.features import Features
from mimkd_ray.losses.mimkd_loss import MIMKDLoss
from mimkd_ray.losses.terms import Term
from mimkd_ray.pages.write_pages import write_report
from mimkd_ray.train.engine.student import lone_student
from mimkd_ray.train.held_out.neighbours import NEIGHBOURS, TEMPERATURE, knn_accuracy
from mimkd_ray.train.networks.build import build_network


def png(image: np.ndarray) -> bytes:
    Image.fromarray(image).save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


def parquet(folder: Path, split: str, rows: int, labels: Any) -> None:
    """Digits as Parquet; ``labels(label, number)``, or no such column for None."""
    found = DigitsSource("train").read(range(rows))
    columns: dict[str, Any] = {"image": [{"bytes": png(row.image), "path": None} for row in found]}
    if labels is not None:
        columns["label"] = pa.array([labels(row.label, n) for n, row in enumerate(found)], pa.int64())
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{split}-00000-of-00001.parquet", row_group_size=20)


@pytest.fixture
def bare(tmp_path: Path) -> str:
    """A set without a column of labels."""
    for split in ("train", "validation"):
        parquet(tmp_path / "bare", split, 60, None)
    return str(tmp_path / "bare")


@pytest.fixture
def half(tmp_path: Path) -> str:
    """Every second training image has a label, all held-out ones have."""
    parquet(tmp_path / "half", "train", 60, lambda label, n: label if n % 2 else None)
    parquet(tmp_path / "half", "validation", 50, lambda label, n: label)
    return str(tmp_path / "half")


def at(root: str, labels: str, **data: Any) -> dict[str, Any]:
    return {"root": root, "labels": labels, "subset": 0, **data}


def test_a_set_without_labels(bare: str, tmp_path: Path) -> None:
    """Features alone train the student, nothing is judged, and the last student is the best."""
    sections = {"data": at(bare, "none", num_classes=4), "run": {"tensorboard": False, "keep_best": True}}
    preflight(tiny_config(**sections))
    result = run_tiny(tmp_path / "run", **sections)
    assert result["teacher"]["top1"] is None
    assert np.isnan([result["student"][key] for key in ("top1", "top5", "cross_entropy", "knn")]).all()
    assert result["nats"]
    saved = [(tmp_path / "run" / name).read_bytes() for name in ("best.safetensors", "student.safetensors")]
    assert saved[0] == saved[1]


def test_labels_that_are_there_have_no_part_in_training(tmp_path: Path) -> None:
    """`none` on a labelled set: other labels give the same student bit for bit, and k-NN reads the true ones."""
    parquet(tmp_path / "a", "train", 60, lambda label, n: label)
    parquet(tmp_path / "a", "validation", 50, lambda label, n: label)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    parquet(tmp_path / "b", "train", 60, lambda label, n: (label + n) % 10)
    made = {
        name: run_tiny(tmp_path / f"run {name}", data=at(str(tmp_path / name), "none"), loss={"preset": "best"})
        for name in ("a", "b")
    }
    students = [(tmp_path / f"run {name}" / "student.safetensors").read_bytes() for name in made]
    assert students[0] == students[1]
    assert made["a"]["student"]["knn"] > 60 > 40 > made["b"]["student"]["knn"]
    labelled = run_tiny(tmp_path / "labelled", data=at(str(tmp_path / "a"), "all"), loss={"preset": "best"})
    assert "knn" not in labelled["student"]


def test_a_head_that_nothing_trains_is_not_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "validation"):
        parquet(tmp_path / "set", split, 60, lambda label, n: label)
    data = at(str(tmp_path / "set"), "none")
    alone = run_tiny(tmp_path / "features", data=data)
    said = capsys.readouterr().out
    assert f"held-out k-NN {alone['student']['knn']:.2f} %" in said
    assert "held-out top-1" not in said
    assert alone["student"]["head_learns"] is False
    page = Path(write_report(str(tmp_path / "features"))).read_text()
    assert "by k nearest neighbours" in page
    assert "top-1 of the student" not in page
    taught = run_tiny(tmp_path / "logits", data=data, loss={"preset": "best"})
    assert f"held-out top-1 {taught['student']['top1']:.2f} %, k-NN" in capsys.readouterr().out
    assert "head_learns" not in taught["student"]


def test_partial_labels(half: str, tmp_path: Path) -> None:
    """Half of the images have labels, and the cross-entropy is theirs."""
    data = at(half, "partial")
    config = tiny_config(data=data)
    preflight(config)
    opened = open_data(config.data)
    student = lone_student(config, opened, build_network(config, 10, "random"), cpu())
    student.inputs.start(0)
    for lane in student.inputs.step(0):
        output, logits = student.distiller.output(lane.images_BCHW, lane.labels_B, lane.ids_B, lane.teacher)
        known = lane.labels_B >= 0
        assert 0 < known.sum() < len(known)
        assert torch.allclose(output.log["ce"], F.cross_entropy(logits[known], lane.labels_B[known]))
    whole = run_tiny(tmp_path / "whole", data=data)
    assert whole["student"]["knn"] > 60
    assert whole["student"]["rows"] == 50


def test_folders_of_images_without_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for row in DigitsSource("train").read(range(30)):
            place = tmp_path / "set" / split / ("more" if row.id % 3 == 0 else ".") / f"{row.id}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(png(row.image))  # type: ignore[arg-type]
    data = open_data(tiny_config(data=at(str(tmp_path / "set"), "none", num_classes=3)).data)
    assert (data.train.num_rows, data.classes, data.judged) == (30, (), False)
    assert {row.label for row in data.train.read(range(30))} == {-1}
    assert len({bytes(row.image) for row in data.train.read(range(30))}) == 30  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"has no labels, and so no number of classes: pass --data.num-classes"):
        open_data(tiny_config(data=at(str(tmp_path / "set"), "none")).data)


def loss_of(labels: Any, **fields: Any) -> MIMKDLoss:
    torch.manual_seed(0)
    term = Term(kind="global", teacher="t", student="s", weight=1.0, teacher_channels=6, student_channels=6)
    return MIMKDLoss(LossConfig(negatives="all", **fields), [term], labels=labels).double()


def test_images_without_a_label_are_negatives_of_all_others() -> None:
    """With classes left out: those of one class are no negatives of each other, those of no class are of everybody."""
    torch.manual_seed(1)
    features = Features(torch.randn(5, 3).double(), {"t": torch.randn(5, 6).double()}, {})
    student = features._replace(vectors={"s": torch.randn(5, 6).double()})
    ids_B = torch.arange(5)

    def ceiling(labels_B: Tensor) -> float:
        log = loss_of("partial", same_class="leave_out")(features, student, labels_B, ids_B).log
        return float(next(value for key, value in log.items() if key.endswith("/ceiling")))

    assert ceiling(torch.tensor([-1, -1, -1, -1, -1])) == pytest.approx(np.log(5))
    assert ceiling(torch.tensor([0, 0, 0, 0, 0])) == pytest.approx(0)
    assert ceiling(torch.tensor([0, 0, -1, -1, 1])) == pytest.approx((2 * np.log(4) + 3 * np.log(5)) / 5)


def test_no_label_in_a_lane_gives_zero_and_finite_gradients() -> None:
    features = Features(torch.randn(4, 3).double(), {"t": torch.randn(4, 6).double()}, {})
    for labels in ("partial", "none"):
        logits = torch.randn(4, 3).double().requires_grad_()
        student = Features(logits, {"s": torch.randn(4, 6).double()}, {})
        output = loss_of(labels, label_smoothing=0.1)(features, student, torch.full((4,), -1), torch.arange(4))
        output.total.backward()
        assert float(output.log["ce"]) == 0
        assert torch.equal(logits.grad, torch.zeros(4, 3).double())


@pytest.mark.parametrize("alone", [False, True])
def test_knn_is_a_weighted_vote(alone: bool) -> None:
    torch.manual_seed(0)
    labels_N, labels_Q = torch.randint(0, 4, (50,)), torch.randint(0, 4, (30,))
    bank, queries = torch.randn(50, 5) + labels_N[:, None], torch.randn(30, 5) + labels_Q[:, None]
    if alone:
        queries, labels_Q = bank, labels_N
    hits = 0
    for place, query in enumerate(queries):
        votes, scored = [0.0] * 4, []
        for number, row in enumerate(bank):
            if not (alone and number == place):
                scored.append((float(F.cosine_similarity(query, row, dim=0)), int(labels_N[number])))
        for cosine, label in sorted(scored)[-NEIGHBOURS:]:
            votes[label] += float(np.exp(cosine / TEMPERATURE))
        hits += int(np.argmax(votes) == labels_Q[place])
    found = knn_accuracy(bank, labels_N, queries, labels_Q, leave_one_out=alone)
    assert found == pytest.approx(100 * hits / len(queries))


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({"data": {"labels": "none"}, "loss": {"name": ()}}, "the loss has nothing but labels to learn from"),
        ({"data": {"labels": "none"}, "teacher": {"train": True}}, "teacher.train has nothing but labels"),
        ({"data": {"labels": "none"}, "compare": {"seeds": 2}}, "arm alone has nothing but labels"),
        ({"data": {"labels": "partial"}, "loss": {"name": ("crd",)}}, "crd, which reads the label of every image"),
        ({"data": {"labels": "partial"}, "mix": {"mixup_alpha": 0.2}}, "a mix of images with and without a label"),
    ],
)
def test_what_needs_labels_is_refused(sections: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        tiny_config(**sections)


def test_sets_without_labels_are_still_refused_by_default(bare: str, half: str) -> None:
    with pytest.raises(UserError, match="no column of labels"):
        preflight(tiny_config(data=at(bare, "all")))
    with pytest.raises(UserError, match=r"labels down to -1, .*--data.labels partial, or none"):
        preflight(tiny_config(data=at(half, "all")))
    config = tiny_config(data=at(bare, "none", num_classes=4))
    compared = replace(config, compare=replace(config.compare, seeds=2, arms=("mimkd",)))
    with pytest.raises(UserError, match=r"compare.seeds asks for accuracies: pass --compare.seeds 0"):
        preflight(compared)
