"""A search on two Ray nodes, one killed midway: trials of two workers, some stopped by ASHA, no deadlock."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from jobs_here import CHANCE, ENVIRONMENT, ROOT, TAKES_LONG, Job

pytestmark = [TAKES_LONG, pytest.mark.ray, pytest.mark.slow]

# Digits, a random teacher, trials of 40 epochs of four steps with two workers: one a node at a time.
FLAGS = (
    *("demo", "--teacher.train", "false", "--teacher.name", "cifar/resnet8", "--data.subset", "80", *CHANCE),
    *("--train.lanes", "2", "--train.lane-batch", "10", "--train.eval-batch", "150", "--train.information-rows", "50"),
    *("--loss.critic.width", "16", "--search.holdout", "0.2", "--search.finalists", "0", "--search.epochs", "40"),
    *("--search.workers", "2", "--search.algorithm", "grid", "--search.reduction", "2", "--run.name", "s"),
    *("--search.space", "tiny_search:slow_second"),
)


@pytest.mark.timeout(900)
def test_a_node_is_killed_under_trials_of_two_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    for name, value in {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}/tests:{ROOT}")
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{ROOT}/tests:{ROOT}")
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
        arguments = [sys.executable, str(ROOT / "jobs" / "search.py"), *FLAGS, "--run.root", str(tmp_path)]
        job = Job([*arguments, "--launch.address", cluster.address], tmp_path / "log")
        job.wait_until(lambda: sum(bool(row["curve"]) for row in rows(tmp_path)) >= 2, 400)
        assert "2 at a time, 2 workers with 1 CPU each a trial" in (tmp_path / "log").read_text()
        cluster.remove_node(nodes[1], allow_graceful=False)
        assert job.end(600) == 0, (tmp_path / "log").read_text()
    finally:
        cluster.shutdown()
    found = rows(tmp_path)
    print([(row["state"], row["curve"][-1]["epoch"], row["reason"]) for row in found])
    assert len(found) == 3
    assert {row["state"] for row in found} <= {"completed", "stopped"}
    whole = [row for row in found if row["state"] == "completed"]
    assert all([point["epoch"] for point in row["curve"]] == list(range(1, 41)) for row in whole)


def rows(root: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((root / "s" / "trials").glob("*.json"))]
