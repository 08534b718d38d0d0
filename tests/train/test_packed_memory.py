"""A pack of which a member finds no memory: it leaves, and the others go on as if alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_packed import Dropping, alone, pack, quick, same
from tiny_run import cpu, tiny_config, tiny_data
from torch import Tensor

from mimkd_ray.errors import MemberMemoryError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.train.engine import evaluation as module
from mimkd_ray.train.engine.evaluation import evaluate_together
from mimkd_ray.train.engine.student import Student, lone_student


class Hungry(Dropping):
    """A student that asks for 32 TB in its third step of one lane."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.steps = 0

    def forward(self, images: Tensor) -> Tensor:
        self.steps += self.training
        if self.steps > 2:
            torch.empty(2**45, dtype=torch.uint8)
        return super().forward(images)


class Wide(Dropping):
    """A student that asks for 32 TB when it is put on its device."""

    def _apply(self, *arguments: Any, **options: Any) -> Wide:
        torch.empty(2**45, dtype=torch.uint8)
        return super()._apply(*arguments, **options)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lone twin of the second of `quick`."""
    root = tmp_path_factory.mktemp("twin")
    alone(quick()[1:2], root)
    return root / "0"


def test_a_member_without_memory_leaves_and_the_others_go_on(
    tmp_path: Path, twin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One while it trains, one before that: by real allocations."""
    configs = quick()
    one = replace(configs[0], student=replace(configs[0].student, name="test_packed_memory:Hungry"))
    wide = replace(configs[0], student=replace(configs[0].student, name="test_packed_memory:Wide"))
    outcomes = pack([one, configs[1], wide], tmp_path / "pack")
    for number, when in ((0, "in step 3"), (2, "before the first step")):
        error = outcomes[number].error
        assert isinstance(error, MemberMemoryError)
        assert f"out of memory {when}: " in str(error)
        assert "can't allocate memory" in str(error)
    assert not (tmp_path / "pack" / "2" / "metrics.jsonl").exists()
    same(tmp_path / "pack" / "1", twin)

    both = pack([one, wide], tmp_path / "none")
    assert all(isinstance(outcome.error, MemberMemoryError) for outcome in both)
    monkeypatch.setattr(Student, "schedule", lambda *_: pytest.fail("trained again"))
    again = pack([one, wide], tmp_path / "none")
    assert [str(outcome.error) for outcome in again] == [str(outcome.error) for outcome in both]


class _Counting(Dropping):
    """A student that counts its training steps of one lane, and what asks for 32 TB."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.steps = 0

    def forward(self, images: Tensor) -> Tensor:
        self.steps += self.training
        return super().forward(images)

    def ask(self) -> None:
        torch.empty(2**45, dtype=torch.uint8)


class HungryLook(_Counting):
    """Finds no memory for accuracy in its second evaluation, in batches of 150."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training and self.steps >= 12 and len(images) > 10:
            self.ask()
        return super().forward(images)


class HungryReading(_Counting):
    """Finds no memory when mutual information is read, in batches of a lane."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training and self.steps and len(images) == 10:
            self.ask()
        return super().forward(images)


class HungrySave(_Counting):
    """Finds no memory for its second checkpoint."""

    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        if self.steps >= 12:
            self.ask()
        return super().state_dict(*arguments, **named)


class HungryExport(_Counting):
    """Finds no memory for student.safetensors."""

    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        if self.steps >= 18:
            self.ask()
        return super().state_dict(*arguments, **named)


def test_a_member_without_memory_to_be_evaluated_or_saved_leaves_alone(tmp_path: Path, twin: Path) -> None:
    """Three epochs of six steps, each with an evaluation and a checkpoint; by real allocations."""
    configs = quick()
    hungry = {
        HungryLook: "in the evaluation after step 12",
        HungryReading: "in the evaluation after step 6",
        HungrySave: "in the checkpoint after step 12",
        HungryExport: "in the export after step 18",
    }
    names = [f"test_packed_memory:{kind.__name__}" for kind in hungry]
    asking = [replace(configs[0], student=replace(configs[0].student, name=name)) for name in names]
    outcomes = pack([*asking, configs[1]], tmp_path / "pack")
    for outcome, when in zip(outcomes, hungry.values(), strict=False):
        assert isinstance(outcome.error, MemberMemoryError)
        assert f"out of memory {when}: " in str(outcome.error)
        assert "can't allocate memory" in str(outcome.error)
    same(tmp_path / "pack" / str(len(hungry)), twin)

    one = pack(asking[1:2], tmp_path / "one")  # nobody is left after its first evaluation
    assert str(one[0].error) == str(outcomes[1].error)


def test_a_lone_run_without_memory_to_be_evaluated_ends_with_the_allocators_words(tmp_path: Path) -> None:
    config = replace(quick()[0], student=replace(quick()[0].student, name="test_packed_memory:HungryLook"))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        alone([config], tmp_path)


def test_who_finds_no_memory_for_k_nn_leaves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(data={"labels": "none"}, train={"information_rows": 0})
    student = lone_student(config, tiny_data(config), build_model("cifar/resnet8", 10), cpu())
    monkeypatch.setattr(module, "knn_top1", lambda *_: torch.empty(2**45, dtype=torch.uint8))
    failed: dict[Student, str] = {}
    assert evaluate_together([student], failed) == {}
    assert "can't allocate memory" in failed[student]
