"""Jobs that join a Ray which was there before: its workers open URLs whose credentials are in nothing that is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from jobs_here import ENVIRONMENT, ROOT, TAKES_LONG, small
from secret_server import no_secret_in, saved, server, url_of

from mimkd_ray import secret_urls
from mimkd_ray.cli import command_line
from mimkd_ray.recipes import IMAGENET_RECIPES

__all__ = ["server"]  # a fixture

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def nothing_known(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This Ray knows nothing of what comes later."""
    monkeypatch.setenv(secret_urls.VARIABLE, "{}")


@TAKES_LONG
def test_a_run_and_a_search(cluster: str, server: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one = ("--launch.address", cluster, "--launch.workers", "1")
    flags = [*small(tmp_path, *one), "--teacher.weights", url_of(server)]
    flags[flags.index("--train.epochs") + 1] = "1"
    assert command_line.main(IMAGENET_RECIPES, "demo", flags) == 0
    assert (tmp_path / "small" / "result.json").exists()
    trials = ["--search.trials", "1", "--search.epochs", "1", "--search.holdout", "0.2", "--search.finalists", "0"]
    flags[flags.index("--run.name") + 1] = "s"
    job = [sys.executable, str(ROOT / "jobs" / "search.py"), *flags, *trials]  # it connects by itself
    done = subprocess.run(job, capture_output=True, text=True, check=False, env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 0, done.stdout + done.stderr
    no_secret_in(done.stdout + done.stderr)
    assert (tmp_path / "s" / "best.json").exists()
    no_secret_in(saved(tmp_path))
    session = ray.init(ignore_reinit_error=True).address_info["session_dir"]
    no_secret_in(saved(Path(session, "logs")))
    said = capfd.readouterr()
    no_secret_in(said.out + said.err)
