"""A student is planned once, and its start follows from its seed alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_packed import config_of, pack, variants
from tiny_run import cpu, run_tiny, tiny_config, tiny_data

from mimkd_ray.config import Config, LossConfig
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.losses.mimkd_loss import MIMKDLoss
from mimkd_ray.models.build_model import build_model
from mimkd_ray.seeds import derive
from mimkd_ray.train.engine.inputs import Inputs
from mimkd_ray.train.engine.student import Student, lone_student
from mimkd_ray.train.networks import build
from mimkd_ray.train.networks.build import build_network, plan_student, plan_taps


def by_hand(config: Config, teacher: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The start of student and critics: each from a seed of its own, whatever was built or drawn before."""
    torch.manual_seed(derive(config.train.seed, "student"))
    student = build_model(config.student.name, 10, "random", config.data.image_size)
    plan = plan_taps(config.loss, teacher, student, config.data.image_size, config.cache)
    torch.manual_seed(derive(config.train.seed, "critics"))
    loss = MIMKDLoss(config.loss, plan.terms, plan.rivals)
    return {f"student.model.{key}": value for key, value in student.state_dict().items()} | {
        f"loss.{key}": value for key, value in loss.state_dict().items()
    }


def same_state(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("preset", ["two_sided", "accuracy", "best", "paper"])
def test_student_and_critics_start_from_seeds_of_their_own(preset: Any, seed: int) -> None:
    config = replace(tiny_config(train={"seed": seed}), loss=LossConfig(preset=preset, queue=40))
    data = tiny_data(config)
    teacher = build_network(config, data.num_classes, "random")
    expected = by_hand(config, teacher)
    torch.manual_seed(99)
    alone = lone_student(config, data, teacher, cpu())
    same_state(alone.distiller.state_dict(), expected)
    assert torch.initial_seed() == derive(seed, "critics"), "what follows draws what it always drew"


def test_a_member_of_a_pack_starts_as_a_lone_student(tmp_path: Path) -> None:
    configs = [config for number, config in enumerate(variants(config_of("one lane", tmp_path))) if number != 2]
    data = open_data(configs[0].data)
    teacher = build_network(configs[0], data.num_classes, "random")
    expected = [by_hand(config, teacher) for config in configs]
    planned = [plan_student(config, teacher, data.num_classes) for config in configs]
    inputs = Inputs(planned, data, teacher, cpu())
    for one, start in zip(planned, expected, strict=True):
        same_state(Student(one, inputs).distiller.state_dict(), start)


def test_nobody_builds_or_plans_a_student_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where codecs are fitted for the taps that a run reads, nor in a pack."""
    built: list[str] = []
    planned: list[LossConfig] = []

    def build_student(config: Config, num_classes: int) -> torch.nn.Module:
        built.append(config.student.name)
        return real_build(config, num_classes)

    def plan(loss: LossConfig, *rest: Any) -> Any:
        planned.append(loss)
        return real_plan(loss, *rest)

    real_build, real_plan = build.build_student, build.plan_taps
    monkeypatch.setattr(build, "build_student", build_student)
    monkeypatch.setattr(build, "plan_taps", plan)
    run_tiny(tmp_path / "run", cache={"codecs": ("stage3:map=pca4,uint8",), "calibration_rows": 300})
    assert (len(built), len(planned)) == (1, 1)
    short = config_of("one lane", tmp_path)
    configs = variants(replace(short, train=replace(short.train, max_steps=1)))
    pack(configs, tmp_path / "pack")
    assert built[1:] == [config.student.name for config in configs]
    assert planned[1:] == [config.loss for config in configs if config.loss.uses_teacher]
