"""When a checkpoint is due and when training stops, in one process with a clock of the test's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_run import cpu, tiny_config

from mimkd_ray.cli.local_launch import LocalContext
from mimkd_ray.config import RunConfig
from mimkd_ray.train import loop
from mimkd_ray.train.distributed import Preemption
from mimkd_ray.train.job import run_job
from mimkd_ray.train.records import save_and_stop
from mimkd_ray.train.records.save_and_stop import AGREE_STEPS, Rhythm


class _Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(save_and_stop.time, "monotonic", lambda: self.now)


def _saves(context: LocalContext, clock: _Clock, steps: int, seconds: float, **fields: Any) -> list[int]:
    """The steps after which a checkpoint is due, in epochs of 10 steps."""
    asked = Rhythm(RunConfig(**{"checkpoint_every": 0, "checkpoint_minutes": 0, **fields}), context, 10, 0)
    found = []
    for done in range(1, steps + 1):
        clock.now += seconds
        if asked.after(done).save:
            found.append(done)
    return found


def test_by_epochs_steps_and_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    assert _saves(cpu(), clock, 40, 1.0) == []
    assert _saves(cpu(), clock, 40, 1.0, checkpoint_every=2) == [20, 40]
    assert _saves(cpu(), clock, 40, 1.0, checkpoint_steps=7) == [7, 14, 21, 28, 35]
    assert _saves(cpu(), clock, 40, 10.0, checkpoint_minutes=2) == [12, 24, 36]
    by_default = RunConfig().checkpoint_minutes  # Ray kills 3 s after `ray job stop`: at most a minute is lost
    assert _saves(cpu(), clock, 13, 10.0, checkpoint_minutes=by_default) == [6, 12]
    # Any checkpoint puts off the next one by time.
    assert _saves(cpu(), clock, 40, 10.0, checkpoint_minutes=2, checkpoint_steps=7) == [7, 14, 21, 28, 35]


def test_a_stop_is_seen_within_a_second_or_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    for seconds in (5.0, 0.01):
        context = cpu()
        asked = Rhythm(RunConfig(checkpoint_every=0, checkpoint_minutes=0.0), context, 10**6, 0)
        for done in range(1, 201):
            clock.now += seconds
            assert not asked.after(done).stop
        context._stopping = True
        stopped_at, began = 0, clock.now
        for done in range(201, 201 + 2 * AGREE_STEPS):
            clock.now += seconds
            if asked.after(done).stop:
                stopped_at = done
                break
        assert stopped_at
        assert clock.now - began <= max(seconds, 1.0) + 0.02


def test_workers_agree_rarely_when_steps_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    talks = []
    monkeypatch.setattr(save_and_stop, "all_max", lambda values: talks.append(1) or values)
    asked = Rhythm(RunConfig(checkpoint_every=0), cpu(), 10**6, 0)
    for done in range(1, 1001):
        clock.now += 0.005
        asked.after(done)
    assert 1000 / AGREE_STEPS <= len(talks) <= 1000 / AGREE_STEPS + 2


def test_a_notice_saves_once_per_set_of_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    context = cpu()
    a = Preemption(nodes=("a",), ranks=(0, 1), deadline=5000.0)
    sooner = Preemption(nodes=("a",), ranks=(0, 1), deadline=4000.0)
    both = Preemption(nodes=("a", "b"), ranks=(0, 1, 2))
    answers = {range(50): None, range(50, 75): a, range(75, 100): sooner, range(100, 200): both}
    asked = Rhythm(RunConfig(checkpoint_every=0, checkpoint_minutes=0.0), context, 10**6, 0)
    seen = []
    for done in range(1, 200):
        clock.now += 1.0
        context.preemption = lambda done=done: next(now for steps, now in answers.items() if done in steps)  # type: ignore[method-assign]
        decision = asked.after(done)
        assert decision.save == (decision.notice is not None)
        assert not decision.stop
        if decision.notice:
            seen.append((decision.notice, done))
    assert [notice for notice, _ in seen] == [a, both], "once per set, not again when a deadline moves"
    assert 50 <= seen[0][1] <= 54
    assert 100 <= seen[1][1] <= 104


@pytest.mark.parametrize(("left", "when"), [(None, ""), (118.0, " in 118 s"), (-3.0, " in 0 s")])
def test_a_notice_is_printed_and_saved_for(
    left: float | None, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of three steps that is told of a node after the first one, and goes on to its end."""
    notice = Preemption(nodes=("a1", "b2"), ranks=(0, 3), deadline=None if left is None else 5000.0 + left)
    monkeypatch.setattr(save_and_stop, "NOTICE_SECONDS", 0.0)
    monkeypatch.setattr(save_and_stop, "AGREE_SECONDS", 0.0)
    monkeypatch.setattr(loop.time, "time", lambda: 5000.0)
    context = cpu()
    context.preemption = lambda: notice  # type: ignore[method-assign]
    config = tiny_config(train={"epochs": 1}, run={"checkpoint_every": 0, "checkpoint_minutes": 0.0})
    run_job(config, context, str(tmp_path))
    said = [line for line in capsys.readouterr().out.splitlines() if "taken away" in line]
    assert said == [f"nodes a1, b2 with workers 0, 3 will be taken away{when}: saving at step 1, and training on"]
    assert list((tmp_path / "checkpoints").glob("step_00000001-*/committed.json"))
