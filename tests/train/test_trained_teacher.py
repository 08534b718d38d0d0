"""Teachers that are trained first, or fine-tuned, and shared by the runs beside each other."""

from __future__ import annotations

import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import cpu, run_tiny, tiny_config, tiny_data

from mimkd_ray.__main__ import main
from mimkd_ray.cli.preflight import preflight
from mimkd_ray.config import Config
from mimkd_ray.errors import Interrupted, UserError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.models.head import head_of
from mimkd_ray.run_lock import held
from mimkd_ray.train import trained_teacher
from mimkd_ray.train.engine.student import lone_student
from mimkd_ray.train.job import obtain_teacher
from mimkd_ray.train.trained_teacher import folder_of, teacher_config

TRAINED: dict[str, Any] = {"train": True, "epochs": 1}


def teachers(root: Path) -> list[Path]:
    return sorted((root / "teachers").iterdir())


def test_a_teacher_is_trained_once_on_all_rows_with_labels_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another weight of the loss does not train it again, another rate of its own does."""
    sections: dict[str, dict[str, Any]] = {"train": {"lane_batch": 30}}
    result = run_tiny(tmp_path / "a", teacher=TRAINED, **sections)
    (folder,) = teachers(tmp_path)
    own = json.loads((folder / "result.json").read_text())
    assert own["steps"] == 1347 // 60  # all training rows, not the subset of 60
    assert own["nats"] == {}
    assert result["teacher"]["top1"] == pytest.approx(own["student"]["top1"])
    assert result["teacher"]["weights"] == str(folder / "student.safetensors")
    assert not (folder / "lock.json").exists()

    written = (folder / "student.safetensors").stat().st_mtime_ns
    other = run_tiny(tmp_path / "b", teacher=TRAINED, loss={"local_weight": 3.0}, **sections)
    assert other["teacher"]["sha256"] == result["teacher"]["sha256"]
    assert teachers(tmp_path) == [folder]
    assert (folder / "student.safetensors").stat().st_mtime_ns == written
    assert f"was trained before, in {folder}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sections", "same"),
    [
        ({"loss": {"kd_weight": 2.0}}, True),
        ({"student": {"name": "cifar/resnet20"}}, True),
        ({"teacher": {"expect_top1": 5.0}}, True),
        ({"data": {"subset": 120}}, True),
        ({"run": {"start_from": "/runs/a", "name": "b"}}, True),
        ({"teacher": {"lr": 0.5}}, False),
        ({"teacher": {"name": "cifar/resnet20"}}, False),
        ({"data": {"pipeline": "none"}}, False),
        ({"train": {"seed": 1}}, False),
        ({"optim": {"weight_decay": 0.1}}, False),
        ({"loss": {"label_smoothing": 0.1}}, False),
    ],
)
def test_its_place_is_a_digest_of_what_decides_it(sections: dict[str, Any], same: bool) -> None:
    def place(config: Config) -> str:
        own = teacher_config(config)
        assert own.run.start_from == ""
        return folder_of(own, tiny_data(own), "", "/runs/a")

    of_teacher = TRAINED | sections.pop("teacher", {})
    assert (place(tiny_config(teacher=TRAINED)) == place(tiny_config(teacher=of_teacher, **sections))) is same


def test_weights_that_it_starts_from_count_by_their_content(tmp_path: Path) -> None:
    file = tmp_path / "given.safetensors"
    own = teacher_config(tiny_config(teacher={"finetune": True, "weights": str(file), "epochs": 2}))
    places = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        save_file(build_model("cifar/resnet8", 7).state_dict(), file)
        places.append(folder_of(own, tiny_data(own), "", "/runs/a"))
    assert places[0] == places[2] != places[1]


def test_the_teachers_own_schedule() -> None:
    own = teacher_config(tiny_config(teacher={"train": True, "epochs": 7, "lr": 0.3}, loss={"label_smoothing": 0.1}))
    assert (own.train.epochs, own.optim.lr, own.loss.label_smoothing) == (7, 0.3, 0.1)
    assert not own.loss.uses_teacher
    assert own.student.name == "cifar/resnet8"


def test_a_run_waits_for_the_teacher_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trained_teacher, "LOOK_SECONDS", 0.05)
    config = tiny_config(teacher=TRAINED, train={"lane_batch": 30})
    own = teacher_config(config)
    folder = folder_of(own, tiny_data(own), "", str(tmp_path / "a"))
    context = cpu()
    with held(folder):
        monkeypatch.setattr(context, "stop_requested", lambda: True)
        with pytest.raises(Interrupted, match=r"asked to stop while process \d+ on .* trained the teacher in"):
            obtain_teacher(config, tiny_data(), context, str(tmp_path / "a"))
    monkeypatch.undo()
    monkeypatch.setattr(trained_teacher, "LOOK_SECONDS", 0.05)
    ended = threading.Event()

    def other() -> None:
        with held(folder):
            while "waiting for the teacher" not in "".join(said):
                said.append(capsys.readouterr().out)
                time.sleep(0.05)
        ended.set()

    said: list[str] = []
    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    while not Path(folder, "lock.json").exists():
        time.sleep(0.01)
    obtain_teacher(config, tiny_data(), cpu(), str(tmp_path / "a"))
    assert ended.wait(10)
    assert Path(folder, "result.json").exists()
    capsys.readouterr()
    in_turn = trained_teacher._in_turn

    def after_another(*arguments: Any) -> None:
        in_turn(*arguments)
        shutil.move(tmp_path / "result.json", folder)

    shutil.move(Path(folder, "result.json"), tmp_path)
    monkeypatch.setattr(trained_teacher, "_in_turn", after_another)
    obtain_teacher(config, tiny_data(), cpu(), str(tmp_path / "b"))
    told = capsys.readouterr().out
    assert "was trained before, in" in told
    assert "training the teacher" not in told


def test_fine_tuning_trains_a_new_head_and_then_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a file of seven classes, for ten."""
    torch.manual_seed(1)
    save_file(build_model("cifar/resnet8", 7).state_dict(), tmp_path / "seven.safetensors")
    given = load_file(tmp_path / "seven.safetensors")
    tuned = {"finetune": True, "weights": str(tmp_path / "seven.safetensors"), "epochs": 2, "lr": 0.05}
    config = tiny_config(teacher=tuned, train={"lane_batch": 30})
    preflight(config)
    own = teacher_config(config)
    student = lone_student(own, tiny_data(own), None, cpu())
    network = student.distiller.student.model
    head = head_of(network, 10)
    at_start = {name: value.clone() for name, value in network.named_parameters()}
    for name, value in at_start.items():
        assert name.startswith(head) or torch.equal(value, given[name]), name
    for step in range(student.order.steps_per_epoch + 1):
        if step == student.order.steps_per_epoch:
            moved = {name for name, value in network.named_parameters() if not torch.equal(value, at_start[name])}
            assert moved == {f"{head}.weight", f"{head}.bias"}
        student.step(step)
    moved = {name for name, value in network.named_parameters() if not torch.equal(value, at_start[name])}
    assert moved == set(at_start)
    student.inputs.close()

    result = run_tiny(tmp_path / "run", teacher=tuned | {"expect_top1": 99.0}, train={"lane_batch": 30})
    (folder,) = teachers(tmp_path)
    assert result["teacher"]["weights"] == str(folder / "student.safetensors")
    assert load_file(folder / "student.safetensors")[f"{head}.weight"].shape[0] == 10
    assert main(["evaluate", str(tmp_path / "run"), "--eval.network", "teacher"]) == 0
    assert f"weights {folder / 'student.safetensors'}" in capsys.readouterr().out


def test_a_resumed_fine_tuning_knows_where_it_is(tmp_path: Path) -> None:
    """The optimiser has no state of what was not trained yet."""
    own = tiny_config(student={"head_epochs": 1}, loss={"name": (), "kd_weight": 0.0}, train={"precision": "float64"})
    straight = run_tiny(tmp_path / "straight", **_sections(own))
    run_tiny(tmp_path / "resumed", **_sections(replace(own, train=replace(own.train, max_steps=2))))
    resumed = run_tiny(tmp_path / "resumed", **_sections(own))
    assert resumed["resumed_from"] == 2
    assert resumed["student"] == straight["student"]
    one, other = (load_file(tmp_path / name / "student.safetensors") for name in ("straight", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def _sections(config: Config) -> dict[str, dict[str, Any]]:
    return {
        "student": {"head_epochs": config.student.head_epochs},
        "loss": {"name": config.loss.name, "kd_weight": config.loss.kd_weight},
        "train": {"precision": config.train.precision, "max_steps": config.train.max_steps},
        "optim": {"schedule": "step"},
    }


@pytest.mark.parametrize(
    ("teacher", "match"),
    [
        ({"finetune": True}, r"fine-tuning starts from weights; pass --teacher.weights published"),
        ({"finetune": True, "weights": "published", "train": True}, r"teacher.train is true and teacher.weights is"),
        ({"finetune": True, "weights": "published", "epochs": 1}, r"teacher.head_epochs is 1, of 1 epochs: none is"),
        ({"finetune": True, "weights": "published", "input": "own"}, r"teacher.finetune is true, which trains it on"),
        ({"finetune": True, "weights": "published", "classes": 7}, r"teacher.finetune is true, so that the teacher"),
    ],
)
def test_wrong_fine_tuning_is_refused(teacher: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        tiny_config(teacher=teacher)


def test_a_network_without_a_head_says_so() -> None:
    with pytest.raises(UserError, match=r"ResNet has no last layer of 11 outputs"):
        head_of(build_model("resnet18", 10), 11)
    assert head_of(build_model("resnet18", 10), 10) == "fc"
    assert head_of(build_model("mobilenet_v2", 10), 10) == "classifier.1"
