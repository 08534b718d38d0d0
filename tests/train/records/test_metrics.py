from __future__ import annotations

import re

import pytest
import torch
from tiny_run import cpu

from mimkd_ray.errors import NonFiniteLossError
from mimkd_ray.train.records import metrics
from mimkd_ray.train.records.metrics import FiniteGuard, Progress, clock


def test_plain_lines_carry_rate_time_left_and_metrics(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    asked = []
    progress = Progress(cpu(), "r34_r18", 100, 400, 512)
    for step in range(101, 401):
        now[0] += 0.5
        progress.update(step, lambda step=step: asked.append(step) or "loss 1.0")  # type: ignore[misc]
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "r34_r18: step 120/400, 1024 images/s, 0:02:20 left, loss 1.0"
    assert lines[-1] == "r34_r18: step 400/400, 1024 images/s, 0:00:00 left, loss 1.0"
    assert len(lines) == len(asked) == 15  # one in ten seconds; metrics are not read in between


def test_a_slow_start_is_forgotten_after_a_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    progress = Progress(cpu(), "x", 0, 1000, 10)
    for step in range(1, 1001):
        now[0] += 66.0 if step == 1 else 0.25  # the first step is compiled
        progress.update(step, lambda: "loss 1.0")
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("x: step 41/1000, 5 images/s")  # 41 steps in 76 s
    later = [line for line in lines if ", 40 images/s, " in line]
    assert len(later) >= len(lines) - 8
    step, left = re.search(r"step (\d+)/1000, 40 images/s, 0:0(\d:\d\d) left", later[0]).groups()  # type: ignore[union-attr]
    minutes, seconds = map(int, left.split(":"))
    assert abs(60 * minutes + seconds - (1000 - int(step)) * 0.25) <= 1


def test_other_workers_and_quiet_runs_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    other = cpu()
    other.rank = 1
    for progress in (Progress(other, "x", 0, 1, 1), Progress(cpu(), "x", 0, 1, 1, quiet=True)):
        progress.update(1, lambda: pytest.fail("asked for metrics that nobody sees"))
        progress.close()
    assert capsys.readouterr().out == ""


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]


def test_a_gpus_loss_is_looked_at_one_step_later_but_before_a_checkpoint() -> None:
    guard = FiniteGuard(torch.device("cuda"))
    bad = {"loss": torch.tensor(float("inf")), "ce": torch.tensor(1.0), "feature/a-b/loss": torch.tensor(float("nan"))}
    guard.add(7, bad, [torch.tensor([3, 5])])
    with pytest.raises(NonFiniteLossError, match=re.escape("at step 7; not finite: feature/a-b/loss")):
        guard.check_all()
    guard.add(8, bad, [torch.tensor([3, 5])])
    with pytest.raises(NonFiniteLossError, match="sample ids 3, 5"):
        guard.add(9, {"loss": torch.tensor(1.0)}, [torch.tensor([4])])
