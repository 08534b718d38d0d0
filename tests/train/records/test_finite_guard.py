from __future__ import annotations

import re

import pytest
import torch

from mimkd_ray.errors import NonFiniteLossError
from mimkd_ray.train.records.finite_guard import FiniteGuard


def test_a_gpus_loss_is_looked_at_one_step_later_but_before_a_checkpoint() -> None:
    guard = FiniteGuard(torch.device("cuda"))
    bad = {"loss": torch.tensor(float("inf")), "ce": torch.tensor(1.0), "feature/a-b/loss": torch.tensor(float("nan"))}
    bad["rival/dkd"] = torch.tensor(float("nan"))
    guard.add(7, bad, [torch.tensor([3, 5])])
    with pytest.raises(NonFiniteLossError, match=re.escape("at step 7; not finite: feature/a-b/loss, rival/dkd (")):
        guard.check_all()
    guard.add(8, bad, [torch.tensor([3, 5])])
    with pytest.raises(NonFiniteLossError, match="sample ids 3, 5"):
        guard.add(9, {"loss": torch.tensor(1.0)}, [torch.tensor([4])])


class _OnGPU:
    """A loss on a GPU: it is copied without waiting, and to look at it any other way would wait."""

    is_cuda, device = True, torch.device("cuda")

    def __init__(self, value: float) -> None:
        self.value = value

    def to(self, where: str, non_blocking: bool) -> torch.Tensor:
        assert (where, non_blocking) == ("cpu", True)
        return torch.tensor(self.value)


def test_a_loss_is_read_when_its_own_step_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain read, one step later, would wait for that step too, and the GPU then for the host."""
    events: list[str] = []

    class Event:
        def record(self, _: object) -> None:
            self.number = len([event for event in events if event.startswith("asked")]) + 1
            events.append(f"asked {self.number}")

        def synchronize(self) -> None:
            events.append(f"awaited {self.number}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    guard = FiniteGuard(torch.device("cuda"))
    for step in (1, 2, 3):
        guard.add(step, {"loss": _OnGPU(1.0)}, [])  # type: ignore[dict-item]
    assert events == ["asked 1", "asked 2", "awaited 1", "asked 3", "awaited 2"]
