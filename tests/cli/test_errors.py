"""Errors of workers and tasks in an existing Ray: one line, a status, and no restart."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs_here import ENVIRONMENT, ROOT, small

from mimkd_ray.cli import common, training
from mimkd_ray.config.json_form import to_dict
from mimkd_ray.errors import DamagedDataError, Interrupted, NonFiniteLossError, UserError
from mimkd_ray.on_ray import train_workers
from mimkd_ray.recipes import IMAGENET_RECIPES
from mimkd_ray.storage import StorageError


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a Ray that is there already, with two CPUs: jobs join it and leave it running."""
    if " " in sys.executable:
        pytest.skip(f"Ray starts workers with environment variables through a shell, which breaks at {sys.executable}")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        import ray

        context = ray.init(address="local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1")
        yield context.address_info["gcs_address"]
        assert ray.is_initialized(), "a job must not end a Ray that it did not start"
        ray.shutdown()


def answer(
    capsys: pytest.CaptureFixture[str], root: Path, address: str, *more: str
) -> tuple[int, list[str], dict[str, Any] | None]:
    """Exit status, what our command line wrote to standard error, and the error that a worker left."""
    status = common.main(IMAGENET_RECIPES, "demo", small(root, "--launch.address", address, *more))
    program = f"{sys.argv[0]}: "
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(program)]
    file = root / "small" / "error.json"
    return status, said, json.loads(file.read_text()) if file.exists() else None


def train_workers_so_far() -> int:
    """Workers that Ray Train has started in this cluster, the ended ones among them."""
    from ray._private.state import actors

    return sum(actor["ActorClassName"] == "RayTrainWorker" for actor in actors().values())


@pytest.mark.ray
@pytest.mark.slow
def test_too_few_cpus_is_an_error_with_numbers(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--launch.workers", "2", "--launch.cpus-per-worker", "3")
    status, said, left = answer(capsys, tmp_path, cluster, *more)
    assert status == 2
    assert len(said) == 1
    assert "2 workers with 3 CPUs each do not fit: the cluster has 2 CPUs and 0 GPUs" in said[0]
    assert left is None, "no worker was started"


@pytest.mark.ray
@pytest.mark.slow
def test_a_workers_user_error_is_one_line_and_status_two(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the default number of restarts, of which none is made: it could not mend anything."""
    before = train_workers_so_far()
    status, said, left = answer(capsys, tmp_path, cluster, "--teacher.expect-top1", "95")
    assert train_workers_so_far() == before + 2
    assert status == 2
    assert len(said) == 1
    assert "teacher cifar/resnet8 with weights random reaches" in said[0]
    assert "95.00 % was expected" in said[0]
    assert left is not None
    assert left["kind"] == "UserError"
    assert not (tmp_path / "small" / "metrics.jsonl").exists()


@pytest.mark.ray
@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("a flag"), 2),
        (DamagedDataError("an image"), 1),
        (NonFiniteLossError("at step 3"), 1),
        (StorageError("an object"), 1),
        (Interrupted("saved at step 7"), 3),
    ],
)
def test_every_error_that_a_worker_leaves_ends_the_job_with_its_message_and_status(
    error: Exception, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way of an error, without Ray: a worker leaves it, the controller ends the run, the driver raises it."""

    def fail(*_: object) -> None:
        raise error

    class Worker:
        launch_id = "this"

    monkeypatch.setattr(train_workers, "RayContext", lambda *_: Worker())
    monkeypatch.setattr(train_workers, "run_job", fail)
    setup = {"launch_id": "this", "run_dir": str(tmp_path), "joined": True, "timeline": {}}
    setup["config"] = to_dict(IMAGENET_RECIPES["demo"]())
    if status == 3:
        train_workers.worker(setup)  # all workers end together: nothing has failed
    else:
        with pytest.raises(type(error)) as raised:
            train_workers.worker(setup)
        with pytest.raises(type(error)):
            train_workers.EndAtOnce().after_exception(None, {1: RuntimeError("lost its peer"), 0: raised.value})
    monkeypatch.setattr(training, "run", lambda _: train_workers._raise_known(str(tmp_path), "this"))
    assert common.main(IMAGENET_RECIPES, "demo", []) == status
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(error) in said
    train_workers.worker(setup)  # should Ray restart it all the same, it ends by itself
    train_workers._raise_known(str(tmp_path), "another start")


def test_what_a_restart_may_mend_is_left_to_ray() -> None:
    train_workers.EndAtOnce().after_exception(None, {0: RuntimeError("lost its peer"), 2: OSError("reset")})
