"""jobs/search.py under Ray Tune: killed and stopped in every way, and given again."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs_here import CHANCE, ROOT, TAKES_LONG, Job, kill, meanwhile, processes
from some_trials import read_trials

from mimkd_ray.cli.search import main
from mimkd_ray.config import Config
from mimkd_ray.config.form.json_form import from_dict
from mimkd_ray.recipes import IMAGENET_RECIPES
from mimkd_ray.search.run_trials import train_trial

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

EPOCHS = 16
# Digits, a random teacher, trials of epochs of four steps.
FLAGS = (
    *("demo", "--teacher.train", "false", "--teacher.name", "cifar/resnet8", *CHANCE, "--data.subset", "80"),
    *("--train.lanes", "2", "--train.lane-batch", "10", "--train.eval-batch", "150", "--train.information-rows", "50"),
    *("--loss.critic.width", "16", "--search.holdout", "0.2", "--search.finalists", "0", "--search.scheduler", "none"),
    *("--search.epochs", str(EPOCHS), "--search.algorithm", "random", "--run.name", "s"),
)


def rows(root: Path) -> dict[int, dict[str, Any]]:
    found = [json.loads(file.read_text()) for file in sorted((root / "s" / "trials").glob("*.json"))]
    return {row["number"]: row for row in found}


def epochs(root: Path, number: int) -> int:
    """Epochs that a trial has behind it."""
    return len(rows(root).get(number, {}).get("curve", ()))


def ended(root: Path) -> list[dict[str, Any]]:
    return [row for row in rows(root).values() if row["state"] != "running"]


def trial_processes(root: int) -> list[int]:
    """Processes below ``root`` in which Ray Tune trains."""
    return processes(root, "ImplicitFunc")


@TAKES_LONG
def test_killed_trials_and_a_killed_search(joined: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """SIGKILL of the trials' processes, which Tune starts again, then of the whole job; then SIGTERM; given again it
    ends by Tuner.restore. A trial that was killed ends with the weights of one that was not."""
    flags = [*FLAGS, "--search.trials", "3", "--run.root", str(tmp_path)]
    job = Job([sys.executable, str(ROOT / "jobs" / "search.py"), *flags], tmp_path / "log")
    job.wait_until(lambda: epochs(tmp_path, 0) >= 1)
    victims = trial_processes(job.process.pid)
    assert victims
    kill(victims)
    job.wait_until(lambda: len(ended(tmp_path)) >= 1)
    job.kill()
    assert 1 <= len(ended(tmp_path)) < 3
    before = epochs(tmp_path, 2)
    with meanwhile(lambda: epochs(tmp_path, 2) > before, lambda: os.kill(os.getpid(), signal.SIGTERM)) as done:
        assert main(IMAGENET_RECIPES, flags) == 3, "it ends in good order, and can go on"
    assert done.is_set()
    assert "asked to stop" in capfd.readouterr().err
    assert len(ended(tmp_path)) < 3
    assert main(IMAGENET_RECIPES, flags) == 0
    assert re.search(r"\(\d trials? ended before\)", capfd.readouterr().out)
    assert [(each["state"], each["kind"]) for each in rows(tmp_path).values()] == [("completed", "")] * 3
    trials, _ = read_trials(str(tmp_path / "s" / "trials.parquet"))
    assert [[point.epoch for point in trial.curve] for trial in trials] == [list(range(1, EPOCHS + 1))] * 3

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = from_dict(Config, trials[0].config)
    train_trial(config, str(tmp_path / "s"), str(tmp_path / "twin"), torch.device("cpu"), lambda _: None)
    torch.set_num_threads(threads)
    (last,) = sorted((tmp_path / "s" / "tune" / f"trial-{rows(tmp_path)[0]['id']}").glob("checkpoint_*"))[-1:]
    assert (last / "student.safetensors").read_bytes() == (tmp_path / "twin" / "student.safetensors").read_bytes()


@TAKES_LONG
def test_a_trial_whose_process_is_lost_for_good_is_recorded(
    joined: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Killed more often than it may be: it has failed, with what Ray says of it, and the other trial goes on."""
    flags = [*FLAGS, "--search.trials", "2", "--search.retries", "0", "--run.root", str(tmp_path)]
    others = set(trial_processes(os.getpid()))  # of the test before, if they are still ending

    def kill_one() -> None:
        kill([pid for pid in trial_processes(os.getpid()) if pid not in others][:1])

    with meanwhile(lambda: epochs(tmp_path, 0) >= 1, kill_one):
        assert main(IMAGENET_RECIPES, flags) == 0
    lost, whole = sorted(rows(tmp_path).values(), key=lambda each: each["state"] == "completed")
    assert (lost["state"], lost["kind"]) == ("failed", "lost")
    assert "died" in lost["reason"]
    assert whole["state"] == "completed"
    assert "Tuner.restore" not in "".join(capfd.readouterr()), "the same command does that"
