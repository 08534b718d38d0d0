"""Ctrl-C under Ray Train: the workers save, and the job ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from jobs_here import meanwhile, read_lines, small

from mimkd_ray.cli import common
from mimkd_ray.recipes import IMAGENET_RECIPES

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def test_an_interrupted_job_has_saved(cluster: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In a plain process: tests/cli/test_interrupt.py."""
    run_dir = tmp_path / "small"
    flags = small(tmp_path, "--launch.address", cluster, "--launch.workers", "2", "--train.epochs", "2000")
    with meanwhile(lambda: len(read_lines(run_dir / "metrics.jsonl")) > 3, lambda: os.kill(os.getpid(), signal.SIGINT)):
        assert common.main(IMAGENET_RECIPES, "demo", flags) == 3
    said = "".join(capfd.readouterr())
    assert "stopping: the workers are asked to save and end; a second Ctrl-C ends at once" in said
    step = int(said.partition("asked to stop: saved at step ")[2].split()[0])
    assert list((run_dir / "checkpoints").glob(f"step_{step:08d}-*/committed.json"))
