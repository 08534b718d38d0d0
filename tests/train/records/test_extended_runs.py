"""Legs: a run that goes on from another's end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import cpu, tiny_config, tiny_data

from mimkd_ray.cli.training import run
from mimkd_ray.config import CompareConfig, Config
from mimkd_ray.errors import UserError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.train.engine.restart import resume
from mimkd_ray.train.engine.student import lone_student
from mimkd_ray.train.networks.optim import portable_state
from mimkd_ray.train.records import checkpoint
from mimkd_ray.train.records.extended_runs import leg_of
from mimkd_ray.train.records.outcomes import claim
from mimkd_ray.train.trained_teacher import check_leg


def config(root: Path, **sections: dict[str, Any]) -> Config:
    sections["run"] = {"root": str(root), "name": "one", "extend": True} | sections.get("run", {})
    return tiny_config(**sections)


def test_legs(tmp_path: Path) -> None:
    first = run(config(tmp_path))
    assert "legs" not in first
    assert run(config(tmp_path)) == first, "the same command finds it finished"
    with pytest.raises(
        UserError, match=r"train\.epochs: 2 -> 1.* --run\.extend true to go on from its weights, another"
    ):
        run(config(tmp_path, train={"epochs": 1}, run={"extend": False}))
    # So small a rate that the parameters stay where the leg begins.
    still = config(tmp_path, train={"epochs": 1}, optim={"lr": 1e-9, "warmup_epochs": 0.0})
    second = run(still)
    assert second["legs"] == [
        {"from": "", "epochs": 2, "changes": []},
        {"from": str(tmp_path / "one"), "epochs": 1, "changes": second["legs"][1]["changes"]},
    ]
    assert second["legs"][1]["changes"] == ["optim.lr: 0.05 -> 1e-09", "train.epochs: 2 -> 1"]
    before, after = (load_file(tmp_path / name / "student.safetensors") for name in ("one", "one-leg2"))
    parameters = dict(build_model("cifar/resnet8_w4", 10).named_parameters())
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in parameters)
    assert run(still) == second
    (tmp_path / "one-leg2" / "result.json").unlink()  # as of a leg that was stopped: legs are read from their configs
    third = run(config(tmp_path, train={"epochs": 3}))
    assert [leg["epochs"] for leg in third["legs"]] == [2, 1, 3]
    assert third["legs"][2]["from"] == str(tmp_path / "one-leg2")
    assert json.loads((tmp_path / "one-leg3" / "config.json").read_text())["run"]["start_from"].endswith("one-leg2")
    assert run(config(tmp_path)) == first


def test_a_stopped_run_goes_on_with_more_data(tmp_path: Path) -> None:
    """It has a checkpoint and neither result nor weights for other programs."""
    run(config(tmp_path))
    for name in ("result.json", "student.safetensors", "best.json"):
        (tmp_path / "one" / name).unlink(missing_ok=True)
    found = checkpoint.newest(str(tmp_path / "one"))
    assert found is not None
    left = checkpoint.parse(found[1], torch.device("cpu"))["distiller"]
    more = config(tmp_path, data={"subset": 100}, train={"epochs": 1}, optim={"lr": 1e-9, "warmup_epochs": 0.0})
    second = run(more)
    assert second["steps"] == 5
    assert second["legs"][1]["from"] == str(tmp_path / "one")
    assert "data.subset: 60 -> 100" in second["legs"][1]["changes"]
    after = load_file(tmp_path / "one-leg2" / "student.safetensors")
    for name, _ in build_model("cifar/resnet8_w4", 10).named_parameters():
        (of_checkpoint,) = [value for key, value in left.items() if key.endswith(f"model.{name}")]
        assert torch.allclose(of_checkpoint, after[name], atol=1e-6)


def test_the_optimiser_and_critics_go_on(tmp_path: Path) -> None:
    run(config(tmp_path))
    found = checkpoint.newest(str(tmp_path / "one"))
    assert found is not None
    state = checkpoint.parse(found[1], torch.device("cpu"))
    changed = config(tmp_path, optim={"weight_decay": 0.25}, run={"start_from": str(tmp_path / "one")})
    torch.manual_seed(0)
    teacher = build_model("cifar/resnet8", 10).eval()
    student = lone_student(changed, tiny_data(changed), teacher, cpu())
    assert resume(student, str(tmp_path / "new")) == 0
    mine = portable_state(student.optimizer)
    assert mine["state"].keys() == state["optimizer"]["state"].keys() != set()
    for number, its in state["optimizer"]["state"].items():
        assert torch.equal(mine["state"][number]["momentum_buffer"], its["momentum_buffer"])
    assert {group["weight_decay"] for group in student.optimizer.param_groups} <= {0.0, 0.25}
    critics = {name: value for name, value in state["distiller"].items() if name.startswith("loss.")}
    own = student.distiller.state_dict()
    assert critics
    assert all(torch.equal(own[name], value) for name, value in critics.items())


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_run_that_was_given_more_steps_is_gone_on_from_where_it_stands(tmp_path: Path, decay: float) -> None:
    """Its result and weights are those of its earlier end until it comes to the next one. With a moving average the
    next leg begins with that, as it does after an end."""
    longer, average = {"schedule": "constant"}, {"ema_decay": decay}
    run(config(tmp_path, optim=longer, train=average, run={"extend": False}))
    of_the_end = {name: (tmp_path / "one" / name).read_bytes() for name in ("result.json", "student.safetensors")}
    run(config(tmp_path, optim=longer, train={"epochs": 4} | average, run={"extend": False}))
    for name, content in of_the_end.items():  # as a kill leaves it ahead of the end
        (tmp_path / "one" / name).write_bytes(content)
    found = checkpoint.newest(str(tmp_path / "one"))
    assert found is not None
    state = checkpoint.parse(found[1], torch.device("cpu"))
    assert state["step"] == 9
    next_leg = config(tmp_path, optim=longer, train=average, run={"start_from": str(tmp_path / "one")})
    student = lone_student(next_leg, tiny_data(next_leg), build_model("cifar/resnet8", 10).eval(), cpu())
    assert resume(student, str(tmp_path / "new")) == 0
    mine = student.distiller.state_dict()
    averages = state["ema"] if decay else {}
    expected = {
        name: averages.get(name.replace("student.", "module.", 1), own) for name, own in state["distiller"].items()
    }
    assert all(torch.equal(mine[name], value) for name, value in expected.items())
    moved = [name for name, value in expected.items() if not torch.equal(value, state["distiller"][name])]
    assert bool(moved) is bool(decay), "an average that is the student itself shows nothing"


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pass --run\.name"):
        run(config(tmp_path, run={"name": ""}))
    with pytest.raises(UserError, match="goes on with one run"):
        run(replace(config(tmp_path), compare=CompareConfig(seeds=2)))
    run(config(tmp_path))
    with pytest.raises(UserError, match=r"one was trained with sgd, .* optim\.name is adamw: pass --optim\.name sgd"):
        run(config(tmp_path, optim={"name": "adamw"}))
    with pytest.raises(UserError, match=r"start_from .*/one does not fit this configuration"):
        run(config(tmp_path, student={"name": "cifar/resnet8"}))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tmp_path / "one" / "config.json").read_text())
    with pytest.raises(UserError, match="has no checkpoint to go on from"):
        run(config(tmp_path, train={"epochs": 5}, run={"name": "bare"}))


def test_a_leg_trains_no_teacher_of_its_own(tmp_path: Path) -> None:
    """By default a teacher that is trained first has the student's epochs and rate."""
    teacher = {"train": True}
    claim(config(tmp_path, teacher=teacher), str(tmp_path / "one"))
    (tmp_path / "one" / "teacher.json").write_text('{"weights": "/runs/teachers/a/student.safetensors"}')
    (tmp_path / "one" / "student.safetensors").touch()
    longer: dict[str, Any] = {"train": {"epochs": 5}, "optim": {"lr": 0.01}}
    with pytest.raises(UserError, match=r"lr: 0\.05 -> 0\.01; train\.epochs: 2 -> 5\): pass --teacher\.train false "):
        check_leg(*leg_of(config(tmp_path, teacher=teacher, **longer), str(tmp_path / "one")))
    for same in (teacher | {"epochs": 2, "lr": 0.05}, {"weights": "/runs/teachers/a/student.safetensors"}):
        check_leg(*leg_of(config(tmp_path, teacher=same, **longer), str(tmp_path / "one")))
    check_leg(*leg_of(config(tmp_path, teacher=teacher), str(tmp_path / "one")))


def test_a_leg_that_was_refused_before_it_trained_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "student.safetensors").touch()
    claim(config(tmp_path), str(tmp_path / "one"))
    claim(*leg_of(config(tmp_path, optim={"lr": 0.02}), str(tmp_path / "one")))
    assert (tmp_path / "one-leg2").is_dir()
    mended, place = leg_of(config(tmp_path, optim={"lr": 0.01}), str(tmp_path / "one"))
    assert (mended.run.start_from, place) == (str(tmp_path / "one"), str(tmp_path / "one-leg2"))
    claim(mended, place)
    assert json.loads((tmp_path / "one-leg2" / "config.json").read_text())["optim"]["lr"] == 0.01
