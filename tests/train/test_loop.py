from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs_here import TAKES_LONG
from safetensors.torch import load_file
from tiny_run import cpu, run_tiny, tiny_config, tiny_data

from mimkd_ray.errors import NonFiniteLossError, UserError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.seeds import derive
from mimkd_ray.train import loop
from mimkd_ray.train.engine.engines import PlainEngine
from mimkd_ray.train.engine.evaluation import evaluate_together
from mimkd_ray.train.engine.inputs import Inputs
from mimkd_ray.train.engine.step import seed_lane
from mimkd_ray.train.engine.student import Student, lone_student
from mimkd_ray.train.job import run_job
from mimkd_ray.train.packed import Member, train_pack


def _metrics(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def _without_clock(line: dict[str, Any]) -> dict[str, Any]:
    own = ("images_per_second", "data_wait", "cache_hit_rate")
    return {key: value for key, value in line.items() if key not in own}


PLAIN: dict[str, Any] = {"run": {"tensorboard": True}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An undisturbed run, which tests only read: its folder and its result."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, run_tiny(folder, **PLAIN)


def test_a_run_leaves_complete_files(plain: tuple[Path, dict[str, Any]]) -> None:
    folder, result = plain
    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "result.json",
        "student.safetensors",
        "checkpoints",
    }
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["steps"] == 6
    assert 0 <= result["student"]["top1"] <= result["student"]["top5"] <= 100
    assert result["student"]["rows"] == 450
    assert set(result["nats"]) == {"global/pool-pool", "local/pool-stage3", "feature/stage3-stage3"}
    assert result["teacher"]["rows"] == 450
    steps = _metrics(folder, "train")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "nats", "ceiling", "scale", "bias", "mean_u", "mean_v"):
        assert f"feature/stage3-stage3/{key}" in steps[0]
    assert [line["step"] for line in _metrics(folder, "eval")] == [3, 6]


def test_the_exported_student_is_the_evaluated_network(plain: tuple[Path, dict[str, Any]]) -> None:
    folder, result = plain
    config = tiny_config()
    network = build_model("cifar/resnet8_w4", 10)
    network.load_state_dict(load_file(folder / "student.safetensors"))
    student = lone_student(config, tiny_data(config), None, cpu())
    student.distiller.student.model.load_state_dict(network.state_dict())
    assert evaluate_together([student])[student]["top1"] == pytest.approx(result["student"]["top1"])


class _StopError(Exception):
    pass


@pytest.mark.parametrize(("preset", "ema", "labels"), [("two_sided", 0.0, "none"), ("best", 0.9, "all")])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, ema: float, labels: str
) -> None:
    """A queue that the resumed run had to fill anew would show: it holds the images of five steps."""
    sections = {"train": {"epochs": 3, "ema_decay": ema}, "loss": {"preset": preset, "queue": 100, "schedule": "fall"}}
    sections["data"] = {"labels": labels}
    run_tiny(tmp_path / "whole", **sections)

    evaluate = loop.Loop.evaluate

    def dies_in_the_second_evaluation(self: loop.Loop, done: int) -> list[dict[str, Any]]:
        if len(_metrics(tmp_path / "cut", "eval")) == 1:
            while not list((tmp_path / "cut" / "checkpoints").glob("*/committed.json")):  # written beside the training
                time.sleep(0.01)
            raise _StopError
        return evaluate(self, done)

    monkeypatch.setattr(loop.Loop, "evaluate", dies_in_the_second_evaluation)
    with pytest.raises(_StopError):
        run_tiny(tmp_path / "cut", **sections)
    monkeypatch.undo()
    result = run_tiny(tmp_path / "cut", **sections)

    assert result["resumed_from"] == 3
    whole, cut = load_file(tmp_path / "whole/student.safetensors"), load_file(tmp_path / "cut/student.safetensors")
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        assert torch.equal(value, cut[name]), name
    for kind in ("train", "eval"):
        assert [_without_clock(x) for x in _metrics(tmp_path / "whole", kind)] == [
            _without_clock(x) for x in _metrics(tmp_path / "cut", kind)
        ]


@pytest.mark.parametrize("fails", [False, True])
def test_the_engine_is_closed_once_also_after_an_error(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process group whose collectives are in a graph that is not freed cannot be ended."""
    did: list[str] = []

    class Engine(PlainEngine):
        def step(self, students: Any, step: int, failed: Any = None) -> Any:
            if fails and step == 2:
                raise _StopError
            did.append("step")
            return super().step(students, step, failed)

        def close(self) -> None:
            did.append("close")

    monkeypatch.setattr(loop, "make_engine", lambda students: Engine(students[0].inputs))
    with pytest.raises(_StopError) if fails else nullcontext():
        run_tiny(tmp_path)
    assert did == ["step"] * (2 if fails else 6) + ["close"]


@pytest.mark.parametrize(
    "fails", ["student.Student.__init__", "restart.checkpoint.newest", "restart.checkpoint.newest_shared"]
)
def test_the_teacher_keeps_no_hooks_after_an_error_at_the_start(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run, and of a pack."""
    opened: list[Inputs] = []

    def stop(*_: Any, **__: Any) -> None:
        raise _StopError

    class Opened(Inputs):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            opened.append(self)

    for place in ("engine.student", "packed"):
        monkeypatch.setattr(f"mimkd_ray.train.{place}.Inputs", Opened)
    monkeypatch.setattr(f"mimkd_ray.train.engine.{fails}", stop)
    config, teacher = tiny_config(), build_model("cifar/resnet8", 10)
    start = partial(train_pack, [Member(config, str(tmp_path))])
    if "shared" not in fails:
        start = partial(loop.train, config, run_dir=str(tmp_path))
    with pytest.raises(_StopError):
        start(data=tiny_data(config), teacher=teacher, context=cpu())
    assert [inputs.teacher.tapped.names for inputs in opened if inputs.teacher is not None] == [()]


def test_a_finished_run_is_not_trained_again(
    plain: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = plain
    monkeypatch.setattr(Student, "schedule", lambda *_: pytest.fail("a finished run took a step"))
    assert run_tiny(folder, **PLAIN) == json.loads(json.dumps(result))


def test_a_directory_of_another_configuration_is_refused(plain: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=r"optim\.lr: 0\.05 -> 0\.5.*--run\.overwrite true"):
        run_tiny(plain[0], **PLAIN, optim={"lr": 0.5})


def test_a_loss_that_is_no_number_stops_with_step_terms_and_ids(tmp_path: Path) -> None:
    # Each step multiplies the weights by a million.
    overflows: dict[str, Any] = {"optim": {"lr": 1000.0, "weight_decay": 1000.0, "schedule": "constant"}}
    with pytest.raises(NonFiniteLossError) as caught:
        run_tiny(tmp_path, loss={"name": ()}, train={"epochs": 6}, **overflows)
    text = str(caught.value)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    last = max(line["step"] for line in lines)
    assert f"at step {last + 1};" in text, "the step after the last one that was written"
    assert "not finite: ce" in text
    ids = text.split("sample ids ")[1].split(":")[0].split(", ")
    assert len(ids) == 20  # two lanes of ten
    assert all(identity.isdigit() for identity in ids)


def test_max_steps_ends_early_with_a_result(tmp_path: Path) -> None:
    result = run_tiny(tmp_path, train={"max_steps": 4})
    assert result["steps"] == 4
    assert [line["step"] for line in _metrics(tmp_path, "eval")] == [3, 4]


def test_the_moving_average_is_what_is_exported(tmp_path: Path) -> None:
    sections = {"train": {"epochs": 1, "ema_decay": 0.5, "eval_every": 0}, "teacher": {"name": "cifar/resnet8"}}
    labels_only = {"global_weight": 0.0, "local_weight": 0.0, "feature_weight": 0.0}
    run_tiny(tmp_path, loss=labels_only, **sections)
    # By hand: the average starts as the first step's student, then moves half-way to each step's.
    config = tiny_config(loss=labels_only, train={"epochs": 1})
    student = lone_student(config, tiny_data(config), None, cpu())
    student.inputs.start(0)
    mean = torch.zeros(())
    for step in range(student.total_steps):
        student.step(step)
        weight = student.distiller.student.model.head.weight.detach().clone()
        mean = weight if step == 0 else 0.5 * mean + 0.5 * weight
    exported = load_file(tmp_path / "student.safetensors")["head.weight"]
    torch.testing.assert_close(exported, mean, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(exported, weight, rtol=1e-4)


def test_clipping_bounds_the_gradient() -> None:
    config = tiny_config(optim={"clip_norm": 1e-3})
    student = lone_student(config, tiny_data(config), build_model("cifar/resnet8", 10), cpu())
    student.inputs.start(0)
    student.step(0)
    norm = torch.stack([p.grad.norm() for p in student.distiller.parameters() if p.grad is not None]).norm()
    assert float(norm) <= 1e-3 * (1 + 1e-4)


def test_a_lane_draws_what_torch_draws_from_its_seed() -> None:
    seed_lane(3, step=5, lane=1)
    found = torch.rand(4)
    torch.manual_seed(derive(3, "lane", 5, 1))
    assert torch.equal(found, torch.rand(4))


def test_more_workers_than_lanes_is_an_error() -> None:
    context = cpu()
    context.world_size = 3
    with pytest.raises(UserError, match="3 workers for 2 lanes"):
        lone_student(tiny_config(), tiny_data(), None, context)


def test_label_only_runs_need_no_teacher(tmp_path: Path) -> None:
    weights = {"global_weight": 0.0, "local_weight": 0.0, "feature_weight": 0.0}
    result = run_job(tiny_config(loss=weights), cpu(), str(tmp_path))
    assert "teacher" not in result
    assert result["nats"] == {}


@TAKES_LONG
def test_compiled_training_without_graph_breaks_equals_eager() -> None:
    torch._dynamo.reset()
    losses = {}
    teacher = build_model("cifar/resnet8", 10)
    for mode in ("off", "on"):
        config = tiny_config(train={"compile": "off", "precision": "float64"})
        student = lone_student(config, tiny_data(config), teacher, cpu())
        if mode == "on":
            student.distiller.compile(backend="aot_eager", fullgraph=True)
        student.inputs.start(0)
        losses[mode] = [float(student.step(step)[0]["loss"]) for step in range(2)]
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-10)


def test_compilation_without_a_compiler_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mimkd_ray.train.engine.student.has_compiler", lambda: False)
    lone_student(tiny_config(train={"compile": "on"}), tiny_data(), None, cpu())
    assert capsys.readouterr().out.splitlines() == [
        "compilation is off: no C++ compiler (c++, g++ or clang++) was found"
    ]


def test_settings_of_the_compiler_are_those_of_training_while_it_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("optimize_ddp", "recompile_limit")
    before = [getattr(torch._dynamo.config, name) for name in names]
    assert before != [False, loop.GRAPHS]
    seen = []
    real = Student.schedule

    def schedule(self: Student, step: int) -> None:
        seen.append([getattr(torch._dynamo.config, name) for name in names])
        real(self, step)

    monkeypatch.setattr(Student, "schedule", schedule)
    monkeypatch.setattr("mimkd_ray.train.engine.student.has_compiler", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    run_tiny(tmp_path / "compiled", train={"compile": "on", "max_steps": 1})
    run_tiny(tmp_path / "plain", train={"max_steps": 1})
    assert seen == [[False, loop.GRAPHS], before]
    assert [getattr(torch._dynamo.config, name) for name in names] == before


def test_the_log_frequency_does_not_change_training(plain: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run_tiny(tmp_path, train={"log_every": 5, "eval_every": 0})
    often, seldom = (load_file(folder / "student.safetensors") for folder in (plain[0], tmp_path))
    assert all(torch.equal(often[name], seldom[name]) for name in often)
    assert [line["step"] for line in _metrics(tmp_path, "train")] == [5, 6]


def test_a_set_on_the_device_trains_the_same(tmp_path: Path) -> None:
    off = run_tiny(tmp_path / "off", data={"resident": "off"}, run={"log_samples": True})
    on = run_tiny(tmp_path / "on", data={"resident": "on"}, run={"log_samples": True})
    assert on["student"] == off["student"]
    assert (tmp_path / "on/samples.jsonl").read_text() == (tmp_path / "off/samples.jsonl").read_text()
    ours, theirs = (load_file(tmp_path / arm / "student.safetensors") for arm in ("on", "off"))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_summary_is_short(tmp_path: Path) -> None:
    values = {"loss": 1.5, "ce": 1.0, "global/a-b/nats": 3.123, "global/a-b/ceiling": math.log(64)}
    values |= {"feature/a-b/nats": 0.25, "feature/a-b/ceiling": math.inf}
    values |= {"feature/c-d/nats": math.nan, "feature/c-d/ceiling": math.inf}
    assert loop.summary({key: torch.tensor(value) for key, value in values.items()}) == (
        "cross-entropy 1.000, global/a-b 3.12 of at most 4.16 nats, feature/a-b 0.25 nats (estimate), "
        "feature/c-d no valid reading"
    )
    assert loop.summary({"ce": torch.tensor(0.0), "kd": torch.tensor(0.5)}) == "KD 0.500", "without labels"
