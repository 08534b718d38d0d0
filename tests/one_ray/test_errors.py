"""Errors of workers, tasks and builders in an existing Ray: one line, a status, and no restart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jobs_here import ENVIRONMENT, ROOT, TAKES_LONG, small

from mimkd_ray.cli import command_line
from mimkd_ray.recipes import IMAGENET_RECIPES

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def answer(
    capsys: pytest.CaptureFixture[str], root: Path, address: str, *more: str
) -> tuple[int, list[str], dict[str, Any] | None]:
    """Exit status, what our command line wrote to standard error, and the error that a worker left."""
    status = command_line.main(IMAGENET_RECIPES, "demo", small(root, "--launch.address", address, *more))
    program = f"{sys.argv[0]}: "
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(program)]
    file = root / "small" / "error.json"
    return status, said, json.loads(file.read_text()) if file.exists() else None


def train_workers_so_far() -> int:
    """Workers that Ray Train has started in this cluster, the ended ones among them."""
    from ray._private.state import actors

    return sum(actor["ActorClassName"] == "RayTrainWorker" for actor in actors().values())


def test_too_few_cpus_is_an_error_with_numbers(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--launch.workers", "2", "--launch.cpus-per-worker", "3")
    status, said, left = answer(capsys, tmp_path, cluster, *more)
    assert status == 2
    assert len(said) == 1
    assert "2 workers with 3 CPUs each do not fit: the cluster has 2 CPUs and 0 GPUs" in said[0]
    assert left is None, "no worker was started"


@TAKES_LONG
def test_a_workers_user_error_is_one_line_and_status_two(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the default number of restarts, of which none is made: it could not mend anything."""
    before = train_workers_so_far()
    random = ("--teacher.train", "false", "--teacher.allow-chance", "true")
    status, said, left = answer(capsys, tmp_path, cluster, *random, "--teacher.expect-top1", "95")
    assert train_workers_so_far() == before + 2
    assert status == 2
    assert len(said) == 1
    assert "teacher cifar/resnet8 with weights random reaches" in said[0]
    assert "95.00 % was expected" in said[0]
    assert left is not None
    assert left["kind"] == "UserError"
    assert not (tmp_path / "small" / "metrics.jsonl").exists()


@TAKES_LONG
def test_a_tasks_error_is_one_line(cluster: str, tmp_path: Path) -> None:
    """Of the preparation of data: the driver reads labels, and a task finds that the images cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "source" / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"image": [b"a" * 500, b"b" * 500], "label": [0, 1]}), path)
    data = bytearray(path.read_bytes())
    data[4:44] = b"\xff" * 40  # the first page of the first column
    path.write_bytes(data)
    job = [sys.executable, str(ROOT / "jobs" / "prepare_data.py"), "--address", cluster, "--workers", "1"]
    arguments = [*job, "--source", str(path.parent), "--target", str(tmp_path / "set")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 1, done.stdout + done.stderr
    (said,) = done.stderr.strip().splitlines()
    assert "train-00000-of-00001.parquet: row groups 0 to 0 cannot be read" in said
    assert said.endswith("copy the file again")
