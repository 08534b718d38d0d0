"""Turns of students: who finds no memory leaves without a trace, and other errors are nobody's to keep."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from mimkd_ray.train.engine.turns import Turns


class Trained:
    """A weight with a gradient."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.weight.grad = torch.ones(3)
        self.optimizer = torch.optim.SGD([self.weight])


def test_one_without_memory_leaves_and_what_it_held_is_free() -> None:
    first, second = Trained(), Trained()
    failed: dict[Any, str] = {}
    turns: Any = Turns([first, second], failed)
    held: list[weakref.ref[torch.Tensor]] = []

    def forward() -> None:
        activations = torch.zeros(5)
        held.append(weakref.ref(activations))
        torch.empty(2**45, dtype=torch.uint8)

    seen = []
    for _ in range(2):
        for student in turns:
            with turns.of(student):
                seen.append(student)
                if student is first:
                    forward()
                assert held[0]() is None, "activations of the one that left are gone before the next one's turn"
    assert seen == [first, second, second]
    assert list(failed) == [first]
    assert "can't allocate memory" in failed[first]
    assert first.weight.grad is None
    assert second.weight.grad is not None


def test_an_error_without_words_is_named_by_its_kind() -> None:
    student = Trained()
    failed: dict[Any, str] = {}
    turns: Any = Turns([student], failed)
    with turns.of(student):
        raise MemoryError
    assert failed == {student: "MemoryError"}


@pytest.mark.parametrize(("error", "failed"), [(MemoryError("no room"), None), (ValueError("wrong shape"), {})])
def test_other_errors_are_raised(error: Exception, failed: dict[Any, str] | None) -> None:
    student = Trained()
    turns: Any = Turns([student], failed)
    with pytest.raises(type(error), match=str(error)), turns.of(student):
        raise error
    assert not failed
