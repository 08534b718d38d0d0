"""Ctrl-C: the job saves once, and ends at once the second time."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from jobs_here import JOB, TAKES_LONG, Job, read_lines, small

from mimkd_ray.cli import local_launch
from mimkd_ray.cli.local_launch import LocalContext


def test_the_first_is_a_request_and_the_second_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_launch, "TWICE_SECONDS", -1.0)
    context = LocalContext(torch.device("cpu"))
    before = signal.getsignal(signal.SIGINT)
    with context.stops_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        assert context.stop_requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


PLAIN = ("--launch.backend", "local")
RAY = ("--launch.workers", "2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "stopping"),
    [
        (PLAIN, "stopping: saving after this step; a second Ctrl-C ends at once"),
        pytest.param(
            RAY,
            "stopping: the workers are asked to save and end; a second Ctrl-C ends at once",
            marks=(pytest.mark.ray, TAKES_LONG),
        ),
    ],
)
def test_an_interrupted_job_has_saved(launch: tuple[str, ...], stopping: str, tmp_path: Path) -> None:
    arguments = small(tmp_path, *launch, "--train.epochs", "2000")
    job = Job([sys.executable, JOB, *arguments], tmp_path / "log")
    job.wait_until(lambda: len(read_lines(tmp_path / "small/metrics.jsonl")) > 3)
    job.process.send_signal(signal.SIGINT)
    assert job.end() == 3, job.log.read_text()
    said = job.log.read_text()
    assert stopping in said
    step = int(said.partition("asked to stop: saved at step ")[2].split()[0])
    assert list((tmp_path / "small/checkpoints").glob(f"step_{step:08d}-*/committed.json"))
