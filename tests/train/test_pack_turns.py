"""Turns of students: who finds no memory leaves without a trace, and other errors are nobody's to keep."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from mimkd_ray.train.cuda_graphs import record
from mimkd_ray.train.engine.pack_turns import Turns


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


def test_an_error_in_a_recording_leaves_no_stream_loose(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording cannot be ended while a stream that it has forked is not joined."""
    loose: set[Any] = set()

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            if self is not recording:
                loose.add(self)
            loose.discard(other)

    recording, streams = Stream(), [Stream(), Stream(), Stream()]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: recording)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    students = [Trained() for _ in streams]
    turns: Any = Turns(students, None, streams)

    def second_fails() -> None:
        for student in turns:
            with turns.of(student):
                if student is students[1]:
                    assert loose == set(streams[:2])
                    raise MemoryError

    with pytest.raises(MemoryError):
        second_fails()
    assert not loose


def test_a_recording_that_fails_says_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not that it could not be ended either."""

    class Recording(nullcontext[None]):
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__()

        def __exit__(self, *_: Any) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    held: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        activations = torch.zeros(5)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    set_to: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_stream", set_to.append)
    with pytest.raises(RuntimeError, match="CUDA out of memory") as raised:
        record(work, None)  # type: ignore[arg-type]
    del raised
    assert held[0]() is None, "without a search for garbage"
    with pytest.raises(RuntimeError, match="a previous error"):
        record(lambda: None, None)  # type: ignore[arg-type]
    assert set_to == [None, None]
