"""Workers killed one after the other, nodes lost and regained, jobs stopped: the same samples, the same weights."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs_here import ENVIRONMENT, JOB, Job, kill, read_lines, result, run, torchrun, train_workers, weights

from mimkd_ray.data.dataset import DataConfig, open_data
from mimkd_ray.data.order import Order

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LANES, LANE_BATCH = 4, 16
EPOCHS, STEPS_PER_EPOCH = 7, 1347 // (LANES * LANE_BATCH)
STEPS = EPOCHS * STEPS_PER_EPOCH
KILLS = int(os.environ.get("MIMKD_TEST_KILLS", "1"))
WORKERS = (2, 3, 4) if KILLS > 1 else (3,)
"""By default one kill of a worker and one of the job, with three workers; MIMKD_TEST_KILLS=5 takes longer."""

# A random teacher, MIMKD's three kinds of term, float32. Checkpoints fall within epochs.
SMALL = (
    *("--compare.seeds", "0", "--teacher.train", "false", "--teacher.name", "cifar/resnet8", "--data.subset", "0"),
    *("--train.lanes", str(LANES), "--train.lane-batch", str(LANE_BATCH), "--train.epochs", str(EPOCHS)),
    *("--train.log-every", "10", "--train.eval-batch", "150", "--train.eval-every", "3", "--loss.critic.width", "16"),
    *("--data.pipeline", "digits", "--optim.lr", "0.02", "--run.tensorboard", "false", "--run.name", "small"),
    *("--run.checkpoint-every", "0", "--run.checkpoint-steps", "8", "--run.log-samples", "true"),
    *("--launch.max-failures", "20", "--launch.cpus-per-worker", "1"),
)


def command(root: Path, *more: str, python: tuple[str, ...] = (sys.executable,)) -> list[str]:
    return [*python, JOB, "demo", *SMALL, "--run.root", str(root), *more]


def samples(run_dir: Path) -> list[dict[str, Any]]:
    return read_lines(run_dir / "samples.jsonl")


def expected_samples(steps: int) -> list[dict[str, Any]]:
    """The log of an undisturbed run, from the order alone."""
    data = open_data(DataConfig(root="digits"))
    order = Order(data.train.blocks, LANES, LANE_BATCH, 0, 0)
    return [
        {
            "step": step + 1,
            "lane": lane,
            "view": step // STEPS_PER_EPOCH,
            "ids": [row.id for row in data.train.read(order.positions(step, lane).tolist())],
        }
        for step in range(steps)
        for lane in range(LANES)
    ]


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    if " " in sys.executable:
        pytest.skip(f"Ray starts workers with environment variables through a shell, which breaks at {sys.executable}")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_AUTH_MODE", "OMP_NUM_THREADS"):
            patch.setenv(name, ENVIRONMENT[name])
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without CPUs; tests add nodes, each a raylet of its own."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()


def add_node(cluster: Any, cpus: int) -> Any:
    return cluster.add_node(num_cpus=cpus)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", WORKERS)
def test_workers_and_the_job_killed_at_random_end_with_the_twins_weights(
    cluster: Any, tmp_path: Path, workers: int
) -> None:
    add_node(cluster, workers)
    run(command(tmp_path / "twin", "--launch.backend", "local", python=torchrun(workers)))
    twin = tmp_path / "twin" / "small"
    assert samples(twin) == expected_samples(STEPS)

    run_dir = tmp_path / "killed" / "small"
    arguments = command(tmp_path / "killed", "--launch.workers", str(workers), "--launch.address", cluster.address)
    job = Job(arguments, tmp_path / "first.log")
    chance = random.Random(workers)
    # One kill in each stretch of steps, anywhere within it; the last one takes the whole job.
    stretch = (STEPS - 20) // (KILLS + 1)
    moments = [10 + stretch * i + chance.randrange(stretch - 10) for i in range(KILLS + 1)]
    for moment in moments[:-1]:
        job.wait_until(lambda step=moment: len(samples(run_dir)) >= LANES * step)
        kill([chance.choice(train_workers(os.getpid()))])
    job.wait_until(lambda: len(samples(run_dir)) >= LANES * moments[-1])
    job.kill()
    kill(train_workers(os.getpid()))  # a cluster of others' ends them itself, in its own time
    assert job.log.read_text().count("resumed from step") == KILLS
    assert not (run_dir / "result.json").exists()

    printed = run(arguments)
    assert "resumed from step" in printed
    assert result(run_dir)["workers"] == workers
    assert samples(run_dir) == samples(twin)
    assert weights(run_dir) == weights(twin)


@pytest.mark.timeout(600)
def test_a_node_lost_and_regained_and_a_stop(cluster: Any, tmp_path: Path) -> None:
    """4 -> 3 -> 4 workers without a sample lost or repeated, then SIGTERM: saved, and status 3."""
    nodes = [add_node(cluster, 1) for _ in range(4)]
    run_dir = tmp_path / "small"
    more = ("--launch.workers", "2..4", "--launch.address", cluster.address, "--train.epochs", "2000")
    job = Job(command(tmp_path, *more, "--launch.resize-seconds", "5"), tmp_path / "job.log")

    def trained_on(text: str) -> bool:
        """Whether 20 steps have been logged after the log showed ``text`` for the last time."""
        shown = job.log.read_text().rpartition(text)[2]
        return text in job.log.read_text() and shown.count("demo: step") >= 1

    job.wait_until(lambda: len(samples(run_dir)) >= LANES * 30)
    assert "on 3 workers" not in job.log.read_text()
    cluster.remove_node(nodes.pop(), allow_graceful=False)
    job.wait_until(lambda: trained_on("4 lanes on 3 workers"))
    add_node(cluster, 1)
    job.wait_until(lambda: job.log.read_text().count("resumed from step") >= 2)
    before = len(samples(run_dir))
    job.wait_until(lambda: len(samples(run_dir)) >= before + LANES * 20)
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 3, job.log.read_text()
    text = job.log.read_text()
    assert "asked to stop: saved at step" in text
    stopped_at = int(text.rpartition("saved at step ")[2].split()[0])
    assert text.count("4 lanes on 3 workers") == 1
    found = samples(run_dir)
    assert len(found) == LANES * stopped_at
    assert found == expected_samples(stopped_at)
    assert list((run_dir / "checkpoints").glob(f"step_{stopped_at:08d}-*/committed.json"))
