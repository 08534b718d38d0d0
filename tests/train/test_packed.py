"""A pack against lone runs of its members: weights, metrics and results are equal bit for bit, whatever happens to the
others; and the pack goes on after a kill as if nothing had been."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs_here import TAKES_LONG
from safetensors.torch import load_file
from tiny_cache import build_here, cached_config
from tiny_run import cpu, tiny_config, wait_for_checkpoints
from torch import Tensor, nn

from mimkd_ray.config import Config, CriticConfig
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.errors import Interrupted, NonFiniteLossError, UserError
from mimkd_ray.train.engine.student import Student
from mimkd_ray.train.loop import train
from mimkd_ray.train.networks.build import build_network
from mimkd_ray.train.networks.teacher import Teacher
from mimkd_ray.train.packed import Member, train_pack
from mimkd_ray.train.records import checkpoint
from mimkd_ray.train.records.outcomes import Failed, Finished, Outcome, Stopped

TRAIN = {"epochs": 2}
LABELS = {"global_weight": 0.0, "local_weight": 0.0, "feature_weight": 0.0}


class Dropping(nn.Module):
    """A student that draws random numbers in training."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stage3 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.drop(self.pool(self.stage3(images))))


def variants(base: Config) -> list[Config]:
    """Five students of one pack that differ in everything that may differ, and read four different sets of taps."""
    return [
        base,
        replace(
            base,
            student=replace(base.student, name="test_packed:Dropping"),
            loss=replace(
                base.loss,
                bound="jsd",
                negatives="rolled",
                feature_pairs=("stage2:stage3",),
                global_pairs=("pool:pool",),
                local_weight=0.0,
                kd_weight=0.3,
                critic=CriticConfig(width=8, temperature=0.3, learn_temperature=False),
            ),
            optim=replace(base.optim, lr=0.02, clip_norm=1.0),
        ),
        replace(
            base,
            student=replace(base.student, name="cifar/resnet8"),
            loss=replace(base.loss, **LABELS, kd_weight=0.0),
            optim=replace(base.optim, name="adamw", lr=0.001),
            train=replace(base.train, ema_decay=0.5),
        ),
        replace(
            base,
            loss=replace(
                base.loss,
                bound="dv",
                negatives="all",
                feature_weight=0.0,
                locations=9,
                critic=CriticConfig(kind="concat", width=8),
            ),
        ),
        replace(
            base,
            loss=replace(
                base.loss,
                preset="best",
                negatives="queue",
                queue=24,
                global_pairs=("pool:pool", "logits:logits:0.5"),
                soft_temperature=0.2,
                symmetric=True,
                hard_share=0.5,
                schedule="warmup",
                critic=CriticConfig(frozen_width=16),
            ),
        ),
    ]


def members(configs: Sequence[Config], root: Path) -> list[Member]:
    return [Member(config, str(root / str(number))) for number, config in enumerate(configs)]


def pack(configs: Sequence[Config], root: Path, judge: Any = None) -> list[Outcome]:
    data = open_data(configs[0].data)
    network = build_network(configs[0], data.num_classes, "random")
    return train_pack(members(configs, root), data, network, cpu(), judge, {"note": "extra"})


def alone(configs: Sequence[Config], root: Path) -> None:
    """Each member's lone twin."""
    for member in members(configs, root):
        data = open_data(member.config.data)
        network = build_network(member.config, data.num_classes, "random")
        network = network if member.config.loss.uses_teacher else None
        train(member.config, data, network, cpu(), member.run_dir, {"note": "extra"})


def lines(folder: Path) -> list[dict[str, Any]]:
    """Its metrics, without those of the clock and of the node."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    own = ("images_per_second", "data_wait", "cache_hit_rate")
    return [{k: v for k, v in line.items() if k not in own} for line in found]


def result(folder: Path) -> dict[str, Any]:
    """Its result, without what depends on the clock or on restarts."""
    found = json.loads((folder / "result.json").read_text())
    clock = ("images_per_second", "seconds", "timeline", "checkpoints", "resumed_from")
    return {key: value for key, value in found.items() if key not in clock}


def same_weights(ours: Path, theirs: Path) -> None:
    a, b = load_file(ours), load_file(theirs)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def same(ours: Path, theirs: Path) -> None:
    """Two finished runs are equal bit for bit."""
    same_weights(ours / "student.safetensors", theirs / "student.safetensors")
    assert lines(ours) == lines(theirs)
    assert result(ours) == result(theirs)


def config_of(kind: str, tmp_path: Path) -> Config:
    """What the members of a pack share, with a live teacher, a cache, or negatives from other lanes."""
    if kind in ("cached", "drawn"):
        config = cached_config(
            tmp_path / "cache",
            train=TRAIN,
            data={"store": str(tmp_path / "store")},
            cache={"taps": ("stage2",), "negatives": 30},
        )
        build_here(config)
        return replace(config, loss=replace(config.loss, negatives="cache")) if kind == "drawn" else config
    loss = {"negatives": "step"} if kind == "step" else {}
    return tiny_config(train=TRAIN | {"lanes": 1 if kind == "one lane" else 2}, loss=loss)


@pytest.mark.parametrize(
    "kind", ["step", "cached", *(pytest.param(kind, marks=TAKES_LONG) for kind in ("one lane", "drawn"))]
)
def test_members_are_their_lone_twins_bit_for_bit(tmp_path: Path, kind: str) -> None:
    configs = variants(config_of(kind, tmp_path))
    outcomes = pack(configs, tmp_path / "pack")
    alone(configs, tmp_path / "alone")
    for number, outcome in enumerate(outcomes):
        same(tmp_path / "pack" / str(number), tmp_path / "alone" / str(number))
        assert outcome == Finished(json.loads((tmp_path / f"pack/{number}/result.json").read_text()))
    assert len({json.dumps(lines(tmp_path / "pack" / str(number))) for number in range(5)}) == 5, "five students"


def test_the_teacher_runs_once_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 lanes of 6 steps, and one lane's batch of 3 for each of 2 evaluations."""
    calls = []
    real = Teacher.features
    monkeypatch.setattr(Teacher, "features", lambda self, images: calls.append(len(images)) or real(self, images))
    pack(variants(config_of("live", tmp_path))[:3], tmp_path)
    assert calls == ([10] * 6 + [10] * 3) * 2


def quick(**sections: dict[str, Any]) -> list[Config]:
    """Three students that differ in learning rate and weights."""
    base = tiny_config(**{"train": {"epochs": 3, "lanes": 1, "information_rows": 10}, **sections})
    rates = (0.05, 0.01, 0.002)
    return [
        replace(base, optim=replace(base.optim, lr=rate), loss=replace(base.loss, global_weight=rate)) for rate in rates
    ]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lone twins of `quick`."""
    root = tmp_path_factory.mktemp("twins")
    alone(quick(run={"log_samples": True}), root)
    return root


def test_the_judge_hears_every_evaluation_and_stops_members(tmp_path: Path, twins: Path) -> None:
    configs = quick()
    heard: list[tuple[int, dict[int, Mapping[str, Any]]]] = []

    def judge(epoch: int, figures: Mapping[int, Mapping[str, Any]]) -> set[int]:
        heard.append((epoch, dict(figures)))
        # All that belongs to the evaluation is there.
        for number in figures:
            folder = tmp_path / "pack" / str(number)
            assert lines(folder)[-1] == {"kind": "eval", "step": 6 * epoch, "epoch": epoch} | figures[number]
            assert epoch == 3 or checkpoint.newest_shared([str(folder)])[0] == 6 * epoch
            assert (folder / "result.json").exists() is (epoch == 3)
        return {1} if epoch == 2 else {0, 1, 2} if epoch == 3 else set()

    outcomes = pack(configs, tmp_path / "pack", judge)
    assert [(epoch, sorted(figures)) for epoch, figures in heard] == [
        (1, [0, 1, 2]),
        (2, [0, 1, 2]),
        (3, [0, 2]),
    ]
    assert [type(outcome) for outcome in outcomes] == [Finished, Stopped, Finished]
    assert outcomes[1] == Stopped(2)
    assert json.loads((tmp_path / "pack/1/stopped.json").read_text()) == {"epoch": 2, "step": 12}
    for number in (0, 2):
        same(tmp_path / "pack" / str(number), twins / str(number))
    told = [line for line in lines(twins / "1") if line["step"] <= 12]
    assert lines(tmp_path / "pack" / "1") == told
    assert pack(configs, tmp_path / "pack", pytest.fail) == outcomes, "nothing is trained again"


def test_a_pack_whose_members_are_all_stopped_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = pack(quick(data={"labels": "none"}), tmp_path, lambda epoch, figures: figures)
    assert outcomes == [Stopped(1)] * 3
    knn = [f"k-NN {lines(tmp_path / str(number))[-1]['knn']:.2f} %" for number in range(3)]
    assert f"pack of 3: epoch 1, held-out {'; held-out '.join(knn)}" in capsys.readouterr().out


class _KillError(Exception):
    pass


def killed_at(monkeypatch: pytest.MonkeyPatch, step: int, configs: list[Config], root: Path, judge: Any = None) -> None:
    """Train until the first student would begin this step."""
    real = Student.schedule

    def schedule(self: Student, now: int) -> None:
        if now == step:
            raise _KillError
        real(self, now)

    with monkeypatch.context() as patch:
        patch.setattr(Student, "schedule", schedule)
        with pytest.raises(_KillError):
            pack(configs, root, judge)
    wait_for_checkpoints()


def steps_of(folder: Path) -> set[int]:
    return {int(path.name[5:13]) for path in (folder / "checkpoints").iterdir()}


def lose(folder: Path, *steps: int) -> None:
    """Remove a run's checkpoints of these steps."""
    for step in steps:
        (found,) = (folder / "checkpoints").glob(f"step_{step:08d}-*")
        shutil.rmtree(found)


@pytest.mark.parametrize(
    ("lost", "start"), [((), 12), *(pytest.param(*each, marks=TAKES_LONG) for each in (((12,), 6), ((6, 12), 0)))]
)
def test_a_killed_pack_goes_on_from_what_all_members_have(
    tmp_path: Path, twins: Path, monkeypatch: pytest.MonkeyPatch, lost: tuple[int, ...], start: int
) -> None:
    configs = quick(run={"checkpoint_steps": 6, "log_samples": True})
    killed_at(monkeypatch, 15, configs, tmp_path / "cut")
    assert [steps_of(tmp_path / "cut" / str(number)) for number in range(3)] == [{6, 12}] * 3
    lose(tmp_path / "cut" / "1", *lost)
    killed_at(monkeypatch, start + 1, configs, tmp_path / "cut")
    for number in range(3):
        assert max(steps_of(tmp_path / "cut" / str(number)), default=0) == start, "what cannot be used is removed"
    outcomes = pack(configs, tmp_path / "cut")
    for number, outcome in enumerate(outcomes):
        assert isinstance(outcome, Finished)
        assert outcome.result["resumed_from"] == start
        same(tmp_path / "cut" / str(number), twins / str(number))
        ours, theirs = ((root / str(number) / "samples.jsonl").read_bytes() for root in (tmp_path / "cut", twins))
        assert ours == theirs


def test_a_damaged_checkpoint_of_one_member_sets_all_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    configs = quick()[:2]
    killed_at(monkeypatch, 15, configs, tmp_path / "cut")
    (broken,) = (tmp_path / "cut" / "1" / "checkpoints").glob("step_00000012-*")
    (broken / checkpoint.STATE).write_bytes(b"half of")
    outcomes = pack(configs, tmp_path / "cut")
    assert "step_00000012" in caplog.text
    assert [outcome.result["resumed_from"] for outcome in outcomes if isinstance(outcome, Finished)] == [6, 6]


def test_at_any_time_there_is_a_step_that_all_members_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One member is slow to write, and all would keep a single checkpoint."""
    configs = quick(run={"checkpoint_steps": 1, "keep_checkpoints": 1}, train={"max_steps": 8, "lanes": 1, "epochs": 4})
    shared = []
    save = checkpoint.save

    def slow_save(run_dir: str, *arguments: Any) -> str:
        if run_dir.endswith("1"):
            time.sleep(0.1)
        folder = save(run_dir, *arguments)
        shared.append((arguments[0], checkpoint.newest_shared([str(tmp_path / str(number)) for number in range(3)])[0]))
        return folder

    monkeypatch.setattr(checkpoint, "save", slow_save)
    pack(configs, tmp_path)
    assert len(shared) == 24, "of each of three members every step: the limit of steps may grow"
    assert all(found >= step - 1 for step, found in shared)


@TAKES_LONG
def test_a_kill_before_the_verdict_was_carried_out_asks_the_judge_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = quick()
    heard: list[tuple[int, dict[int, Mapping[str, Any]]]] = []

    def worst(epoch: int, figures: Mapping[int, Mapping[str, Any]]) -> list[int]:
        heard.append((epoch, dict(figures)))
        return sorted(figures, key=lambda number: (figures[number]["cross_entropy"], number))[2:]

    def dies(epoch: int, figures: Mapping[int, Mapping[str, Any]]) -> list[int]:
        if epoch == 2:
            raise _KillError
        return []

    with pytest.raises(_KillError):
        pack(configs, tmp_path / "cut", dies)
    outcomes = pack(configs, tmp_path / "cut", worst)
    asked, heard = heard, []
    whole = pack(configs, tmp_path / "whole", lambda *arguments: worst(*arguments) if arguments[0] > 1 else [])
    assert asked == heard
    assert [type(outcome) for outcome in outcomes] == [type(outcome) for outcome in whole]
    assert outcomes.count(Stopped(2)) == whole.count(Stopped(2)) == 1

    # A kill between two members' ends: the judge sees the figures of the one that has ended as well.
    (stopped,) = (number for number, outcome in enumerate(whole) if isinstance(outcome, Stopped))
    again = tmp_path / "again"
    with pytest.raises(_KillError):
        pack(configs, again, dies)
    (again / str(stopped) / "stopped.json").write_text(json.dumps({"epoch": 2, "step": 12}))
    asked, heard = heard, []
    pack(configs, again, worst)
    assert heard == asked


def test_a_member_whose_loss_is_no_number_leaves_and_the_others_go_on(tmp_path: Path) -> None:
    configs = variants(tiny_config(train=TRAIN))[:3]
    configs[1] = replace(configs[1], optim=replace(configs[1].optim, lr=1000.0, weight_decay=1000.0, clip_norm=0.0))
    outcomes = pack(configs, tmp_path / "pack")
    with pytest.raises(NonFiniteLossError) as caught:
        alone(configs[1:2], tmp_path / "broken")
    assert isinstance(outcomes[1], Failed)
    assert isinstance(outcomes[1].error, NonFiniteLossError)
    assert str(outcomes[1].error) == str(caught.value)
    assert json.loads((tmp_path / "pack/1/failed.json").read_text()) == {
        "kind": "NonFiniteLossError",
        "message": str(caught.value),
    }
    assert lines(tmp_path / "pack" / "1") == lines(tmp_path / "broken" / "0")
    del configs[1]
    alone(configs, tmp_path / "alone")
    for ours, theirs in ((0, 0), (2, 1)):
        same(tmp_path / "pack" / str(ours), tmp_path / "alone" / str(theirs))


def test_a_member_with_wrong_taps_or_no_student_is_the_only_one_that_fails(tmp_path: Path, twins: Path) -> None:
    configs = quick()
    configs[0] = replace(configs[0], loss=replace(configs[0].loss, feature_pairs=("stage3:nowhere",)))
    configs[2] = replace(configs[2], student=replace(configs[2].student, name="cifar/nothing"))
    outcomes = pack(configs, tmp_path / "pack")
    for outcome, message in (
        (outcomes[0], "layer 'nowhere' not found"),
        (outcomes[2], "unknown model 'cifar/nothing'"),
    ):
        assert isinstance(outcome, Failed)
        assert isinstance(outcome.error, UserError)
        assert message in str(outcome.error)
    same(tmp_path / "pack" / "1", twins / "1")


def test_one_that_failed_is_not_trained_again_and_if_all_fail_the_pack_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [
        replace(config, optim=replace(config.optim, lr=1000.0, weight_decay=1000.0, schedule="constant"))
        for config in quick()
    ]
    first = pack(configs, tmp_path)
    monkeypatch.setattr(Student, "schedule", lambda *_: pytest.fail("trained again"))
    again = pack(configs, tmp_path)
    assert [str(outcome.error) for outcome in again] == [str(outcome.error) for outcome in first]
    assert all(isinstance(outcome.error, NonFiniteLossError) for outcome in (*first, *again))


def test_a_request_to_stop_saves_all_members(tmp_path: Path, twins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = quick()
    real = Student.schedule

    def schedule(self: Student, step: int) -> None:
        if step == 8:
            stopping.append(1)
        real(self, step)

    stopping: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Student, "schedule", schedule)
        patch.setattr("mimkd_ray.cli.local_launch.LocalContext.stop_requested", lambda _: bool(stopping))
        patch.setattr("mimkd_ray.train.records.save_and_stop.AGREE_STEPS", 1)
        with pytest.raises(Interrupted, match=r"saved at step 9 of 18 in .*/0, .*/1, .*/2"):
            pack(configs, tmp_path / "cut")
    outcomes = pack(configs, tmp_path / "cut")
    for number, outcome in enumerate(outcomes):
        assert isinstance(outcome, Finished)
        assert outcome.result["resumed_from"] == 9
        same(tmp_path / "cut" / str(number), twins / str(number))
