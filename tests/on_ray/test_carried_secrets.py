"""Jobs that join a Ray which was there before: its workers open URLs whose credentials are in nothing that is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs_here import ENVIRONMENT, ROOT, small
from secret_server import no_secret_in, saved, server, url_of

from mimkd_ray import secret_urls
from mimkd_ray.cli import common
from mimkd_ray.recipes import IMAGENET_RECIPES

__all__ = ["server"]  # a fixture

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """Address and folder of a Ray that knows nothing of what comes later."""
    if " " in sys.executable:
        pytest.skip(f"Ray starts workers with environment variables through a shell, which breaks at {sys.executable}")
    for name, value in {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(secret_urls.VARIABLE, "{}")
    import ray

    context = ray.init(address="local", num_cpus=3, include_dashboard=False, _node_ip_address="127.0.0.1")
    yield context.address_info["gcs_address"], Path(context.address_info["session_dir"])
    ray.shutdown()


def test_a_run_and_a_search(
    cluster: tuple[str, Path], server: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    address, session = cluster
    flags = [*small(tmp_path, "--launch.address", address), "--teacher.weights", url_of(server)]
    flags[flags.index("--train.epochs") + 1] = "1"
    assert common.main(IMAGENET_RECIPES, "demo", flags) == 0
    assert (tmp_path / "small" / "result.json").exists()
    trials = ["--search.trials", "1", "--search.epochs", "1", "--search.holdout", "0.2", "--search.finalists", "0"]
    flags[flags.index("--run.name") + 1] = "s"
    job = [sys.executable, str(ROOT / "jobs" / "search.py"), *flags, *trials]  # it connects by itself
    done = subprocess.run(job, capture_output=True, text=True, check=False, env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 0, done.stdout + done.stderr
    no_secret_in(done.stdout + done.stderr)
    assert (tmp_path / "s" / "best.json").exists()
    no_secret_in(saved(tmp_path))
    no_secret_in(saved(session / "logs"))
    said = capfd.readouterr()
    no_secret_in(said.out + said.err)
