from __future__ import annotations

import re

import pytest
from tiny_run import cpu

from mimkd_ray import console
from mimkd_ray.train.records.progress import Progress


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that progress and console see: its one number is to be moved."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    console.use(console.Shown())
    return now


def test_plain_lines_carry_rate_time_left_and_metrics(capsys: pytest.CaptureFixture[str], now: list[float]) -> None:
    asked = []
    progress = Progress(cpu(), "r34_r18", 100, 400, 512)
    for step in range(101, 401):
        now[0] += 0.5
        progress.update(step, lambda step=step: asked.append(step) or "loss 1.0")  # type: ignore[misc]
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "r34_r18: 116 of 400 steps, 1,024 images/s, 0:02:22 left, loss 1.0"
    assert len(lines) == 18  # one in eight seconds
    assert asked == [*range(116, 400, 16), 400]  # metrics are not read in between


def test_a_slow_start_is_forgotten_after_a_minute(capsys: pytest.CaptureFixture[str], now: list[float]) -> None:
    progress = Progress(cpu(), "x", 0, 1000, 10)
    for step in range(1, 1001):
        now[0] += 66.0 if step == 1 else 0.25  # the first step is compiled
        progress.update(step, lambda: "loss 1.0")
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("x: 33 of 1,000 steps, 4 images/s")  # 33 steps in 74 s
    later = [line for line in lines if ", 40 images/s, " in line]
    assert len(later) >= len(lines) - 9
    step, left = re.search(r"(\d+) of 1,000 steps, 40 images/s, 0:0(\d:\d\d) left", later[0]).groups()  # type: ignore[union-attr]
    minutes, seconds = map(int, left.split(":"))
    assert abs(60 * minutes + seconds - (1000 - int(step)) * 0.25) <= 1


def test_other_workers_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    other = cpu()
    other.rank = 1
    progress = Progress(other, "x", 0, 1, 1)
    progress.update(1, lambda: pytest.fail("asked for metrics that nobody sees"))
    progress.close()
    assert capsys.readouterr().out == ""
