"""A pack of which a member finds no memory: it leaves, and the others go on as if alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_pack import Dropping, alone, pack, quick, same
from torch import Tensor

from mimkd_ray.errors import MemberMemoryError
from mimkd_ray.losses.critics import CriticConfig
from mimkd_ray.train.session import Session


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


def test_a_member_without_memory_leaves_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One while it trains, one before that: by real allocations."""
    configs = quick()
    one = replace(configs[0], student=replace(configs[0].student, name="test_pack_memory:Hungry"))
    wide = replace(configs[0], loss=replace(configs[0].loss, critic=CriticConfig(width=2**21)))
    outcomes = pack([*configs, one, wide], tmp_path / "pack")
    for number, when in ((len(configs), "in step 3"), (len(configs) + 1, "before the first step")):
        error = outcomes[number].error
        assert isinstance(error, MemberMemoryError)
        assert f"out of memory {when}: " in str(error)
        assert "can't allocate memory" in str(error)
    assert not (tmp_path / "pack" / str(len(configs) + 1) / "metrics.jsonl").exists()
    alone(configs, tmp_path / "alone")
    for number in range(len(configs)):
        same(tmp_path / "pack" / str(number), tmp_path / "alone" / str(number))

    both = pack([one, wide], tmp_path / "none")
    assert all(isinstance(outcome.error, MemberMemoryError) for outcome in both)
    monkeypatch.setattr(Session, "begin_step", lambda *_: pytest.fail("trained again"))
    again = pack([one, wide], tmp_path / "none")
    assert [str(outcome.error) for outcome in again] == [str(outcome.error) for outcome in both]
