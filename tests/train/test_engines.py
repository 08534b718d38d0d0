"""Captured steps equal plain ones: same samples, views, random numbers, weights and metrics, also after a restart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs_here import TAKES_LONG
from test_packed import alone, config_of, lines, pack, same, same_weights, variants
from tiny_run import cpu, run_tiny, tiny_config, wait_for_checkpoints
from torch.utils._python_dispatch import TorchDispatchMode

from mimkd_ray.config import Config, CriticConfig, LossConfig, MixConfig
from mimkd_ray.config.loss_presets import PRESETS
from mimkd_ray.data.augment.mixing import draw_mix
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.losses import terms
from mimkd_ray.losses.methods.registry import RIVALS
from mimkd_ray.train.cuda_graphs import WARM
from mimkd_ray.train.engine.engines import CapturedEngine, _Seeds, make_engine
from mimkd_ray.train.engine.inputs import Inputs
from mimkd_ray.train.engine.student import Student, lone_student
from mimkd_ray.train.networks.build import build_network, plan_student

DRAWING = (1, 3)
"""Of the variants: a network with dropout, and terms that read random locations."""


def captured(config: Config) -> Config:
    return replace(config, train=replace(config.train, engine="captured"))


@contextmanager
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A with-block in which the engines that are made are listed; they keep what they have recorded."""
    made: list[Any] = []

    def make(*arguments: Any) -> Any:
        made.append(make_engine(*arguments))
        made[-1].close = lambda: None
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr("mimkd_ray.train.loop.make_engine", make)
        yield made


@pytest.mark.parametrize("kind", [pytest.param("one lane", marks=TAKES_LONG), "step", "cached"])
def test_a_captured_pack_equals_plain_lone_runs_bit_for_bit(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = variants(config_of(kind, tmp_path))
    configs = [config for number, config in enumerate(every) if number not in DRAWING]
    with engines(monkeypatch) as made:
        pack([captured(config) for config in configs], tmp_path / "pack")
    (engine,) = made
    assert isinstance(engine, CapturedEngine)
    assert engine.recorded is not None
    assert not engine.gave_up
    alone(configs, tmp_path / "alone")
    for number in range(len(configs)):
        same_weights(tmp_path / f"pack/{number}/student.safetensors", tmp_path / f"alone/{number}/student.safetensors")
        assert lines(tmp_path / "pack" / str(number)) == lines(tmp_path / "alone" / str(number))


def test_random_numbers_of_several_students_end_the_recording_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    every = variants(config_of("one lane", tmp_path))
    configs = [every[number] for number in (0, *DRAWING)]
    with engines(monkeypatch) as made:
        pack([captured(config) for config in configs], tmp_path / "pack")
    assert made[0].gave_up
    assert "steps are not captured" in capsys.readouterr().out
    alone(configs, tmp_path / "alone")
    for number in range(len(configs)):
        same_weights(tmp_path / f"pack/{number}/student.safetensors", tmp_path / f"alone/{number}/student.safetensors")


@pytest.mark.parametrize("member", DRAWING)
def test_a_lone_student_draws_what_a_plain_one_draws(
    tmp_path: Path, member: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = variants(config_of("one lane", tmp_path))[member]
    with engines(monkeypatch) as made:
        alone([captured(config)], tmp_path / "captured")
    assert made[0].recorded is not None
    alone([config], tmp_path / "plain")
    same_weights(tmp_path / "captured/0/student.safetensors", tmp_path / "plain/0/student.safetensors")
    assert lines(tmp_path / "captured/0") == lines(tmp_path / "plain/0")


def over_checkpoints(lanes: int) -> dict[str, Any]:
    """Sections of a run with a checkpoint at every step."""
    return {
        "train": {
            "lanes": lanes,
            "lane_batch": 20 // lanes,
            "epochs": 3,
            "ema_decay": 0.9,
            "information_rows": 0,
        },
        "run": {"checkpoint_steps": 1},
        "optim": {"name": "adamw", "lr": 0.002},
    }


@pytest.mark.parametrize(
    ("lanes", "first", "second"),
    [
        (1, "plain", "captured"),
        (4, "captured", "plain"),
        pytest.param(1, "captured", "plain", marks=TAKES_LONG),
        pytest.param(4, "plain", "captured", marks=TAKES_LONG),
    ],
)
def test_any_engine_goes_on_from_any_checkpoint(
    tmp_path: Path, lanes: int, first: str, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine steps, killed after five: either engine has time to record a step and replay it."""
    sections = over_checkpoints(lanes)
    run_tiny(tmp_path / "whole", **sections)
    real = Student.schedule

    def dies(self: Student, step: int) -> None:
        if step == WARM + 2:
            raise RuntimeError("killed")
        real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Student, "schedule", dies)
        with pytest.raises(RuntimeError, match="killed"):
            run_tiny(tmp_path / "halves", **sections | {"train": sections["train"] | {"engine": first}})
    wait_for_checkpoints()
    run_tiny(tmp_path / "halves", **sections | {"train": sections["train"] | {"engine": second}})
    assert json.loads((tmp_path / "halves/result.json").read_text())["resumed_from"] >= WARM + 1
    same_weights(tmp_path / "halves/student.safetensors", tmp_path / "whole/student.safetensors")


def test_a_member_that_leaves_ends_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_config(train={"epochs": 2, "lanes": 1})
    configs = [base, replace(base, optim=replace(base.optim, lr=0.02))]
    with engines(monkeypatch) as made:
        pack([captured(config) for config in configs], tmp_path / "pack", lambda epoch, _: {0} if epoch == 1 else set())
    assert len(made[0].recorded.students) == 1
    alone(configs[1:], tmp_path / "alone")
    same(tmp_path / "pack/1", tmp_path / "alone/0")


def test_mixed_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By mixup, by CutMix and not at all, in turn."""
    base = tiny_config(train={"lanes": 2, "epochs": 3, "information_rows": 0}, data={"val_rows": 20})
    config = replace(base, mix=MixConfig(mixup_alpha=0.4, cutmix_alpha=1.0, probability=0.7))
    drawn = [draw_mix(config.mix, 0, step, lane, 8, 8) for step in range(9) for lane in range(2)]
    assert {None if one is None else one.box is None for one in drawn[2 * WARM :]} == {None, True, False}
    with engines(monkeypatch) as made:
        alone([captured(config)], tmp_path / "captured")
    assert made[0].recorded is not None
    alone([config], tmp_path / "plain")
    same(tmp_path / "captured/0", tmp_path / "plain/0")


@pytest.mark.parametrize("head_epochs", [1, 2])
def test_the_step_is_recorded_anew_when_the_body_joins(
    tmp_path: Path, head_epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After epochs of three steps: before anything was recorded, and after."""
    base = tiny_config(
        train={"epochs": 4, "lanes": 1, "information_rows": 0},
        optim={"weight_decay": 0.05},
        data={"subset": 30, "val_rows": 20},
    )
    config = replace(base, student=replace(base.student, head_epochs=head_epochs))
    begun, real = [], CapturedEngine._record

    def records(self: CapturedEngine, students: Any) -> str:
        begun.append(students[0].head_alone)
        return real(self, students)

    monkeypatch.setattr(CapturedEngine, "_record", records)
    alone([captured(config)], tmp_path / "captured")
    assert begun == [True, False][2 - head_epochs :]
    alone([config], tmp_path / "plain")
    same(tmp_path / "captured/0", tmp_path / "plain/0")


class _Stream:
    """A CUDA stream's place on a CPU."""

    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass


@pytest.mark.parametrize("leave_at", [1, WARM, WARM + 2])
@pytest.mark.parametrize("left", [1, 2])
def test_each_student_that_is_left_has_a_stream(monkeypatch: pytest.MonkeyPatch, left: int, leave_at: int) -> None:
    """On a GPU students work beside each other; whenever some leave, the streams are those of the others."""
    config = captured(tiny_config(train={"lanes": 1}))
    data = open_data(config.data)
    teacher = build_network(config, data.num_classes, "random")
    planned = [plan_student(config, teacher, data.num_classes) for _ in range(3)]
    inputs = Inputs(planned, data, teacher, cpu())
    students = [Student(one, inputs) for one in planned]
    engine = make_engine(students)
    assert isinstance(engine, CapturedEngine)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    engine.on_gpu = True
    for step in range(leave_at + WARM + 1):
        students = students[:left] if step >= leave_at else students
        taken = engine.step(students, step)
        assert list(taken) == students
        assert len(engine.streams) == (len(students) if len(students) > 1 else 0)
    assert engine.recorded is not None


def test_random_numbers_of_the_host_are_seen_beside_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would repeat what a network drew with torch.rand([]) < 0.1 when it was recorded."""
    state = torch.zeros(4)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: state.clone())
    seeds = _Seeds(0, 0, torch.device("cuda"))
    seeds(0)
    assert seeds.drawn() == set()
    torch.rand([])
    seeds(1)
    assert seeds.drawn() == {"cpu"}
    state.add_(1)
    assert seeds.drawn() == {"cpu", "cuda"}


def test_steps_that_draw_on_the_host_are_not_recorded_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = captured(tiny_config(train={"lanes": 1}))
    data = open_data(config.data)
    student = lone_student(config, data, build_network(config, data.num_classes, "random"), cpu())
    student.distiller.register_forward_pre_hook(lambda *_: torch.rand([]) and None)
    engine = make_engine([student])
    assert isinstance(engine, CapturedEngine)
    engine.stream = object()  # type: ignore[assignment]
    monkeypatch.setattr("mimkd_ray.train.engine.engines.run_warm", lambda work, stream: (work(), []))
    for step in range(WARM):
        engine.step([student], step)
    assert engine.gave_up
    assert "on the host" in capsys.readouterr().out


class NoHost(TorchDispatchMode):
    """Refuses what waits for the device, or copies a value from the host, which a graph cannot hold."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "lift_fresh", "equal", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.removesuffix("2")
        assert name not in self.REFUSED, f"{func} waits for the device or reads from the host"
        if name in ("index", "index_put", "index_put_"):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), "a mask as an index"
        return func(*args, **(kwargs or {}))


OPTIONS: dict[str, LossConfig] = {
    **{preset: LossConfig(preset=preset, queue=40) for preset in PRESETS},
    **{method: LossConfig(name=(method,)) for method in RIVALS},
    "soft": LossConfig(preset="best", queue=40, soft_temperature=0.2, symmetric=True, hard_share=0.5),
    "concat": LossConfig(preset="two_sided", critic=CriticConfig(kind="concat", width=8)),
    "mixed": LossConfig(preset="paper"),
    "step": LossConfig(preset="best", negatives="step"),
    "everywhere": LossConfig(preset="best", queue=40, feature_negatives="all", schedule="rise", local_weight=1.0),
}


def of_banks(name: str) -> bool:
    """Say whether a loss keeps a bank of features, which is for one lane."""
    return any(RIVALS[method].bank for method in OPTIONS[name].rivals)


@pytest.mark.parametrize(
    ("name", "lanes"), [(name, 1 if of_banks(name) else 2) for name in OPTIONS] + [(preset, 1) for preset in PRESETS]
)
def test_nothing_of_a_step_needs_the_host(name: str, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores in chunks."""
    monkeypatch.setattr(terms, "SMALL_SCORE_BYTES", 0)
    config = captured(tiny_config(train={"lanes": lanes, "lane_batch": 6}, optim={"clip_norm": 1.0}))
    config = replace(config, loss=OPTIONS[name], mix=MixConfig(mixup_alpha=0.4 if name == "mixed" else 0.0))
    data = open_data(config.data)
    student = lone_student(config, data, build_network(config, data.num_classes, "random"), cpu())
    engine = make_engine([student])
    assert isinstance(engine, CapturedEngine)
    student.inputs.start(0)
    for step in range(WARM):
        engine.step([student], step)
    with NoHost():
        taken = engine._take([student], None, False)
    assert torch.isfinite(taken[student].log["loss"])


def test_the_mode_refuses_what_it_says() -> None:
    values = torch.arange(4.0)
    for wrong in (
        lambda: values.sum().item(),
        lambda: values[values > 1],
        lambda: bool(values.any()),
        lambda: torch.tensor(3.0) * values,
    ):
        with pytest.raises(AssertionError), NoHost():
            wrong()
