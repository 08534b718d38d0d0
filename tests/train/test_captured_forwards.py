"""Recorded forward passes of evaluations give the figures of plain ones, whatever happens to the weights between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_engines import NoHost, captured
from tiny_run import cpu, tiny_config

from mimkd_ray.config import Config
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.train.cuda_graphs import WARM
from mimkd_ray.train.engine.evaluation import evaluate_together
from mimkd_ray.train.engine.inputs import Inputs
from mimkd_ray.train.engine.student import Student
from mimkd_ray.train.held_out import captured_forwards
from mimkd_ray.train.held_out.captured_forwards import RecordedForwards
from mimkd_ray.train.networks.build import build_network, plan_student

CONFIG = tiny_config(
    train={"eval_batch": 30, "ema_decay": 0.9, "lanes": 1, "information_rows": 0},
    data={"resident": "on", "val_rows": 160},
)
"""160 held-out images: five batches and one of 10."""


def students_of(config: Config, members: int = 1) -> list[Student]:
    data = open_data(config.data)
    teacher = build_network(config, data.num_classes, "random")
    configs = [replace(config, optim=replace(config.optim, lr=0.05 / (1 + number))) for number in range(members)]
    planned = [plan_student(one, teacher, data.num_classes) for one in configs]
    inputs = Inputs(planned, data, teacher, cpu())
    return [Student(one, inputs) for one in planned]


def forwards_of(student: Student) -> RecordedForwards:
    assert student.inputs.forwards is not None
    return student.inputs.forwards


def trained(config: Config, members: int) -> tuple[list[Student], list[dict[str, Any]]]:
    """Students after two steps, and their figures before the first, after each, and after the weights were those of
    the first once more."""
    students, figures = students_of(config, members), []

    def look() -> None:
        figures.extend(evaluate_together(students).values())

    look()
    states = []
    for step in range(2):
        for student, lanes in zip(students, [list(students[0].inputs.step(step))] * members, strict=True):
            student.inputs.step = lambda _, lanes=lanes: lanes  # type: ignore[method-assign, misc]
            student.step(step)
        del students[0].inputs.step
        states.append([(student.distiller.state_dict(), student.ema.state_dict()) for student in students])  # type: ignore[union-attr]
        states[-1] = [tuple({k: v.clone() for k, v in state.items()} for state in both) for both in states[-1]]
        look()
    for student, (own, average) in zip(students, states[0], strict=True):
        student.distiller.load_state_dict(own)
        student.ema.load_state_dict(average)  # type: ignore[union-attr]
    look()
    return students, figures


@pytest.mark.parametrize("members", [1, 2])
def test_figures_are_those_of_a_plain_evaluation(members: int) -> None:
    """Of moving averages, which are trained and loaded between evaluations; the last batch is smaller."""
    _, expected = trained(CONFIG, members)
    students, found = trained(captured(CONFIG), members)
    assert found == expected
    assert found[-members:] == found[members : 2 * members] != found[:members]
    forwards = forwards_of(students[0])
    assert [(known.is_recorded, known.warm) for known in forwards.passes.values()] == [(True, WARM)] * members
    assert all(student.distiller.training for student in students)


def test_weights_that_have_moved_are_recorded_anew() -> None:
    (student,) = students_of(captured(CONFIG))
    forwards, network = forwards_of(student), student.tapped()
    evaluate_together([student])[student]
    first = forwards.passes[network]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.5)
    evaluate_together([student])[student]
    assert forwards.passes[network] is first, "in place"
    parameter = next(network.parameters())
    parameter.data = parameter.data.clone()
    evaluate_together([student])[student]
    assert forwards.passes[network] is not first


def test_nothing_of_a_pass_needs_the_host() -> None:
    (student,) = students_of(captured(CONFIG))
    logits_of = forwards_of(student).of(student.tapped())
    with torch.no_grad(), NoHost():
        for _ in range(WARM + 2):
            logits_of(torch.randn(30, 3, 8, 8))


def test_a_student_that_leaves_frees_its_graph() -> None:
    first, second = students_of(captured(CONFIG), 2)
    evaluate_together([first, second])
    forwards = forwards_of(first)
    assert len(forwards.passes) == 2
    first.inputs.close()
    del second
    assert len(forwards.passes) == 1


@pytest.mark.parametrize("where", ["waits", "recording"])
def test_what_cannot_be_recorded_is_run_plainly(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("operation not permitted\nmore")

    (plain,), (student,) = students_of(CONFIG), students_of(captured(CONFIG))
    forwards = forwards_of(student)
    forwards.stream = object()  # type: ignore[assignment]
    waits = ["net.py, line 3"] if where == "waits" else []
    monkeypatch.setattr(captured_forwards, "run_warm", lambda work, stream: (work(), waits))
    monkeypatch.setattr(captured_forwards, "record", fails)
    assert evaluate_together([student])[student] == evaluate_together([plain])[plain]
    assert forwards.gave_up
    said = "a network waits for the device (net.py, line 3)" if where == "waits" else "operation not permitted\n"
    assert f"evaluations are not captured, and run operation by operation: {said}" in capsys.readouterr().out


def test_only_where_the_engine_is_captured() -> None:
    assert students_of(CONFIG)[0].inputs.forwards is None
    mixed = replace(CONFIG, mix=replace(CONFIG.mix, mixup_alpha=0.2))
    assert students_of(captured(mixed))[0].inputs.forwards is not None
