"""`evaluate` on several processes, on a checkpoint, with damaged images, classes without names, and several labels."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from ranks import start_ranks
from tiny_run import tiny_config

import mimkd_ray
from mimkd_ray.__main__ import main
from mimkd_ray.cli.local_launch import LocalContext
from mimkd_ray.cli.training import run, run_directory
from mimkd_ray.config.jobs.evaluate import EvaluateConfig, evaluate_job
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.errors import UserError
from mimkd_ray.evaluation.measure import measure, save
from mimkd_ray.evaluation.real_labels import read_real
from mimkd_ray.models.build_model import build_model
from mimkd_ray.train.networks.teacher_head import read_names

ALONE: dict[str, Any] = {"name": (), "preset": "accuracy", "feature_pairs": ()}
"""Without a teacher."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run."""
    root = str(tmp_path_factory.mktemp("runs"))
    config = tiny_config(run={"root": root}, loss=ALONE, train={"epochs": 10})
    run(config)
    return Path(run_directory(config))


def evaluate(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 2) -> str:
    capsys.readouterr()
    assert evaluate(*arguments) == status
    return capsys.readouterr().err.splitlines()[-1]


def figures_in(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "evaluation.json").read_text()))


FAST = ("--eval.train-rows", 0, "--eval.tap-rows", 0)


def as_rank(rank: int, world: int, store: str, place: str, out: str) -> None:
    """Evaluate as one of several processes."""
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    config = tiny_config()
    job = evaluate_job(config, eval=EvaluateConfig(train_rows=60, tap_rows=0))
    found = measure(job, LocalContext(torch.device("cpu"), rank, world), place)
    save(found, os.path.join(out, f"rank{rank}"))
    dist.destroy_process_group()


def test_two_processes_find_what_one_does(place: Path, tmp_path: Path) -> None:
    assert evaluate(place, "--eval.train-rows", 60, "--eval.tap-rows", 0, "--eval.out", tmp_path) == 0
    start_ranks(as_rank, (2, str(tmp_path / "store"), str(place), str(tmp_path)), 2)
    alone = figures_in(tmp_path)
    for rank in range(2):
        shared = figures_in(tmp_path / f"rank{rank}")
        for key in ("top1", "top5", "per_class", "confusions", "rows", "knn", "linear_probe"):
            assert shared[key] == alone[key]
        assert shared["calibration"]["ece"] == pytest.approx(alone["calibration"]["ece"], abs=1e-5)
        rows = pq.read_table(tmp_path / f"rank{rank}" / "predictions.parquet")
        columns = ["id", "label", "prediction"]
        assert rows.select(columns).equals(pq.read_table(tmp_path / "predictions.parquet").select(columns))


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_run_that_has_not_ended(tmp_path: Path, ema: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Its newest checkpoint that is not damaged is evaluated, of a run with a moving average that average."""
    config = tiny_config(
        run={"root": str(tmp_path), "keep_checkpoints": 3}, loss=ALONE, train={"epochs": 4, "ema_decay": ema}
    )
    run(config)
    place = Path(run_directory(config))
    (place / "student.safetensors").unlink()
    first, second, third = sorted(place.glob("checkpoints/step_*/state.pt"))
    third.write_bytes(third.read_bytes()[:-1])
    assert evaluate(place, *FAST) == 0
    found = figures_in(place)
    assert found["weights"] == str(second.parent)
    state = torch.load(second, weights_only=True)
    of, prefix = (state["ema"], "module.model.") if ema else (state["distiller"], "student.model.")
    model = build_model("cifar/resnet8_w4", 10)
    model.load_state_dict({key[len(prefix) :]: value for key, value in of.items() if key.startswith(prefix)})
    assert found["top1"] == pytest.approx(mimkd_ray.evaluate(model, config.data).top1)
    for file in (first, second):
        file.write_bytes(b"")
    assert "has no student.safetensors and its 3 checkpoints are damaged" in refused(capsys, place, *FAST)


def test_a_run_at_a_url(place: Path, tmp_path: Path) -> None:
    assert evaluate(place.as_uri(), "--eval.out", f"{tmp_path.as_uri()}/out", *FAST) == 0
    assert figures_in(tmp_path / "out")["rows"] == 450


def test_classes_without_a_name(tmp_path: Path) -> None:
    """The head has two classes more than the data has names: they are numbered, and may be predicted."""
    student = ("--student.name", "cifar/resnet8_w4", "--student.weights", "random")
    flags = (*student, "--data.num-classes", 12, "--eval.out", tmp_path, *FAST)
    assert evaluate(*flags) == 0
    table = pq.read_table(tmp_path / "predictions.parquet").to_pydict()
    assert set(table["prediction"]) <= {str(number) for number in range(12)}
    assert figures_in(tmp_path)["classes"] == 12


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Digits in class folders, under names as those of ImageNet's validation set, numbered from 1."""
    for number, row in enumerate(open_data(tiny_config().data).val.read(range(120)), start=1):
        for split in ("train", "val"):
            folder = tmp_path / "set" / split / str(row.label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(row.image).save(folder / f"ILSVRC2012_val_{number:08d}.png")
    return tmp_path / "set"


def test_damaged_images(place: Path, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A handful is named and left out; more than are allowed are refused."""
    files = sorted((folders / "val").rglob("*.png"))
    flags = (place, "--data.root", folders, "--data.subset", 0, "--eval.out", tmp_path / "out", *FAST)
    for file in files[::40]:
        file.write_bytes(b"no image")
    assert evaluate(*flags) == 0
    found = figures_in(tmp_path / "out")
    assert (found["damaged"], found["rows"]) == (3, 117)
    for file in files[::6]:
        file.write_bytes(b"no image")
    line = refused(capsys, *flags, status=1)
    assert "of 120 images cannot be decoded" in line
    assert "--data.max-damaged" in line


def test_several_right_labels(place: Path, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ReaL's list, by the numbers in the files' names: any of an image's labels is right, and none leaves it out."""
    labels = [row.label for row in open_data(tiny_config().data).val.read(range(120))]
    real = [[] if place_ % 5 == 4 else [label, (label + 3) % 10] for place_, label in enumerate(labels)]
    (tmp_path / "real.json").write_text(json.dumps(real))
    out = tmp_path / "out"
    flags = (place, "--data.root", folders, "--data.subset", 0, "--eval.out", out, *FAST)
    assert evaluate(*flags, "--eval.real", tmp_path / "real.json") == 0
    table = pq.read_table(out / "predictions.parquet").to_pydict()
    source = open_data(tiny_config(data={"root": str(folders), "subset": 0}).data).val
    names = {row.id: row.name for row in source.read(range(120))}
    hits = []
    for id_, prediction in zip(table["id"], table["prediction"], strict=True):
        right = real[int(names[id_].rpartition("_")[2].removesuffix(".png")) - 1]
        hits += [int(prediction) in right] if right else []
    assert figures_in(out)["real"] == {"top1": pytest.approx(100 * sum(hits) / len(hits)), "rows": 96}

    (tmp_path / "real.json").write_text(json.dumps([[(label + 1) % 10] for label in labels]))
    assert "own label is right for 0 of 120" in refused(capsys, *flags, "--eval.real", tmp_path / "real.json")
    (tmp_path / "real.json").write_text(json.dumps(real[:50]))
    assert "has 50 images, and the data has one of number" in refused(
        capsys, *flags, "--eval.real", tmp_path / "real.json"
    )
    (tmp_path / "real.json").write_text('{"a": 1}')
    assert "expected a list with a list" in refused(capsys, *flags, "--eval.real", tmp_path / "real.json")
    assert "there is no such file" in refused(capsys, *flags, "--eval.real", tmp_path / "none.json")
    with pytest.raises(UserError, match=r"cannot be read \(IsADirectoryError\): give real\.json"):
        read_real(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    for read in (read_real, partial(read_names, "eval.classes")):
        with pytest.raises(UserError, match=r"pipe is a pipe or a device, and no file: give the file itself"):
            read(str(tmp_path / "pipe"))
