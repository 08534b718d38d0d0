"""CUDA graphs train what the plain engine trains, and what cannot be recorded is run plainly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_config

from mimkd_ray.cli.local_launch import LocalContext
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.losses.mimkd_loss import MIMKDLoss
from mimkd_ray.train.cuda_graphs import WARM
from mimkd_ray.train.engine.engines import CapturedEngine, make_engine
from mimkd_ray.train.engine.evaluation import evaluate_together
from mimkd_ray.train.engine.inputs import Inputs
from mimkd_ray.train.engine.student import Student
from mimkd_ray.train.loop import train
from mimkd_ray.train.networks.build import build_network, plan_student
from mimkd_ray.train.records import checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = LocalContext(torch.device("cuda"))


def on_gpu(
    engine: str,
    members: int,
    steps: int,
    stay: dict[int, int] | None = None,
    head_epochs: int = 0,
    negatives: Any = None,
    **train: Any,
) -> list[list[float]]:
    """Losses of students on a GPU, by step. They differ in the learning rate. ``stay``: how many are left from a step
    on."""
    config = tiny_config(
        data={"resident": "on"},
        train={"engine": engine, "compile": "off", "lane_batch": 12, "epochs": 200, **train},
        loss={"preset": "best", "queue": 50, "global_weight": 1.0, "negatives": negatives},
        optim={"lr": 0.01},
        student={"name": "cifar/resnet8", "head_epochs": head_epochs},
    )
    data = open_data(config.data)
    teacher = build_network(config, data.num_classes, "random")
    rates = [config.optim.lr / (1 + number) for number in range(members)]
    configs = [replace(config, optim=replace(config.optim, lr=rate)) for rate in rates]
    planned = [plan_student(own, teacher, data.num_classes) for own in configs]
    inputs = Inputs(planned, data, teacher, GPU)
    students = [Student(one, inputs) for one in planned]
    runner = make_engine(students)
    inputs.start(0)
    losses = []
    for step in range(steps):
        if isinstance(runner, CapturedEngine) and runner.recorded is not None and step == WARM + 2:
            torch.cuda.set_sync_debug_mode("error")
        students = students[: (stay or {}).get(step, len(students))]
        taken = runner.step(students, step)
        torch.cuda.set_sync_debug_mode("default")
        losses.append([float(taken[student].log["loss"]) for student in students])
    assert engine == "plain" or (isinstance(runner, CapturedEngine) and runner.recorded is not None)
    inputs.close()
    return losses


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("members", [1, 3])
def test_a_graph_trains_what_the_plain_engine_trains(lanes: int, members: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Else cuDNN may add gradients in another order each time, and training multiplies the difference.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    train = {"precision": "float32", "lanes": lanes}
    graph, plain = (torch.tensor(on_gpu(engine, members, 30, **train)) for engine in ("captured", "plain"))
    assert plain[-5:].mean() < plain[:5].mean(), "it trains"
    # The arithmetic differs in the order of sums, and every step of training multiplies that.
    assert torch.allclose(graph[:8], plain[:8], rtol=2e-3, atol=2e-3)
    assert torch.allclose(graph, plain, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("more", [{"negatives": "step", "lanes": 2}, {"head_epochs": 1}, {"ema_decay": 0.9}])
def test_other_steps_are_recorded_too(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Negatives of the step's other lanes; a body that joins its classifier after an epoch; a moving average."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    graph, plain = (
        torch.tensor(on_gpu(engine, 1, 20, precision="float32", **more)) for engine in ("captured", "plain")
    )
    assert torch.allclose(graph, plain, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("leave_at", [WARM, 2 * WARM], ids=["before the recording", "after it"])
@pytest.mark.parametrize("left", [1, 2])
def test_those_that_stay_are_recorded(left: int, leave_at: int) -> None:
    alone = [first for (first,) in on_gpu("plain", 1, 20, precision="float32")]
    losses = on_gpu("captured", 3, 20, {leave_at: left}, precision="float32")
    assert [len(row) for row in losses] == [3] * leave_at + [left] * (20 - leave_at)
    assert torch.allclose(torch.tensor([row[0] for row in losses]), torch.tensor(alone), rtol=5e-2, atol=5e-2)


def test_a_run_is_written(tmp_path: Path) -> None:
    config = tiny_config(
        data={"resident": "on"},
        train={"epochs": 4, "lanes": 1, "lane_batch": 12, "precision": "float32"},
        run={"checkpoint_steps": 1},
    )
    data = open_data(config.data)
    teacher = build_network(config, data.num_classes, "random")
    result = train(config, data, teacher, GPU, str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in trained] == list(range(1, result["steps"] + 1))
    assert trained[0]["lr"] == pytest.approx(config.optim.lr)
    found = checkpoint.newest(str(tmp_path))
    assert found is not None
    groups = checkpoint.parse(found[1], torch.device("cpu"))["optimizer"]["param_groups"]
    assert all(isinstance(group["lr"], float) and not group["fused"] for group in groups)


def test_what_cannot_be_recorded_is_run_plainly(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MIMKDLoss.forward

    def looks(self: MIMKDLoss, *arguments: Any) -> Any:
        found = real(self, *arguments)
        if not torch.isfinite(found.total).item():
            raise ValueError
        return found

    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    plain = torch.tensor(on_gpu("plain", 2, 10, precision="float32"))
    monkeypatch.setattr(MIMKDLoss, "forward", looks)
    with pytest.raises(AssertionError):  # of the helper: nothing was recorded
        on_gpu("captured", 2, 10, precision="float32")
    assert "steps are not captured" in capsys.readouterr().out
    monkeypatch.setattr(MIMKDLoss, "forward", real)
    graph = torch.tensor(on_gpu("captured", 2, 10, precision="float32"))
    assert torch.allclose(graph, plain, rtol=5e-2, atol=5e-2)


def test_graphs_give_the_figures_of_a_plain_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    found = {}
    for engine in ("captured", "plain"):
        config = tiny_config(
            data={"resident": "on"},
            train={"engine": engine, "compile": "off", "precision": "float32", "eval_batch": 50, "ema_decay": 0.5},
        )
        data = open_data(config.data)
        teacher = build_network(config, data.num_classes, "random")
        inputs = Inputs([plan_student(config, teacher, data.num_classes)], data, teacher, GPU)
        student = Student(plan_student(config, teacher, data.num_classes), inputs)
        found[engine] = [evaluate_together([student])[student]]
        for step in range(2):
            student.step(step)
            found[engine].append(evaluate_together([student])[student])
        if inputs.forwards is not None:
            assert [known.graph is not None for known in inputs.forwards.passes.values()] == [True]
    for graph, plain in zip(found["captured"], found["plain"], strict=True):
        assert graph["top1"] == pytest.approx(plain["top1"], abs=0.5)
        assert graph["cross_entropy"] == pytest.approx(plain["cross_entropy"], rel=1e-2)
    assert found["captured"][0]["cross_entropy"] != found["captured"][1]["cross_entropy"]
