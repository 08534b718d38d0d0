"""Workers killed one after the other, nodes lost and regained, jobs stopped: the same samples, the same weights."""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs_here import CHANCE, ENVIRONMENT, JOB, Job, kill, read_lines, result, run, train_workers, weights
from ranks import start_ranks

from mimkd_ray.cli import command_line
from mimkd_ray.cli.local_launch import LocalContext
from mimkd_ray.config import DataConfig
from mimkd_ray.data.order.sample_order import Order
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.recipes import IMAGENET_RECIPES
from mimkd_ray.train.job import run_job

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif("MIMKD_TEST_KILLS" not in os.environ, reason="needs a machine of its own: MIMKD_TEST_KILLS=5"),
]

LANES, LANE_BATCH = 4, 16
EPOCHS, STEPS_PER_EPOCH = 7, 1347 // (LANES * LANE_BATCH)
STEPS = EPOCHS * STEPS_PER_EPOCH
MOST = 4  # workers of the run that loses nodes
KILLS = int(os.environ.get("MIMKD_TEST_KILLS", "0"))
"""Kills of workers in each run; MIMKD_TEST_KILLS=5 takes a quarter of an hour on two cores."""

# A random teacher, MIMKD's three kinds of term, float32. Checkpoints fall within epochs.
SMALL = (
    *("--compare.seeds", "0", "--teacher.train", "false", "--teacher.name", "cifar/resnet8", "--data.subset", "0"),
    *CHANCE,
    *("--train.lanes", str(LANES), "--train.lane-batch", str(LANE_BATCH), "--train.epochs", str(EPOCHS)),
    *("--train.log-every", "10", "--train.eval-batch", "150", "--train.eval-every", "3", "--loss.critic.width", "16"),
    *("--data.pipeline", "digits", "--optim.lr", "0.02", "--run.tensorboard", "false", "--run.name", "small"),
    *("--run.checkpoint-every", "0", "--run.checkpoint-steps", "8", "--run.log-samples", "true"),
    *("--launch.max-failures", "20", "--launch.cpus-per-worker", "1"),
)


def command(root: Path, *more: str) -> list[str]:
    return [sys.executable, JOB, "demo", *SMALL, "--run.root", str(root), *more]


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
        patch.setitem(ENVIRONMENT, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")  # spent on a node that is gone
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


def train_twin(rank: int, workers: int, run_dir: str) -> None:
    """One worker of the undisturbed run, without a launcher."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{run_dir}.meet", rank=rank, world_size=workers)
    config = command_line.parse(IMAGENET_RECIPES, "demo", SMALL, "twin")
    assert config is not None
    run_job(config, LocalContext(torch.device("cpu"), rank, workers), run_dir)
    dist.destroy_process_group()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [2, 3, 4])
def test_workers_and_the_job_killed_at_random_end_with_the_twins_weights(
    cluster: Any, tmp_path: Path, workers: int
) -> None:
    add_node(cluster, workers)
    twin = tmp_path / "twin" / "small"
    twin.parent.mkdir()
    start_ranks(train_twin, (workers, str(twin)), workers)
    assert samples(twin) == expected_samples(STEPS)

    run_dir = tmp_path / "killed" / "small"
    arguments = command(tmp_path / "killed", "--launch.workers", str(workers), "--launch.address", cluster.address)
    job = Job(arguments, tmp_path / "first.log")
    chance = random.Random(workers)
    # One kill in each stretch of steps, anywhere within it; the last one takes the whole job.
    stretch = (STEPS - 20) // (KILLS + 1)
    moments = [10 + stretch * i + chance.randrange(stretch - 10) for i in range(KILLS + 1)]
    groups: list[list[int]] = []
    for moment in moments:
        job.wait_until(lambda step=moment: len(samples(run_dir)) >= LANES * step)
        groups.append(sorted(train_workers(os.getpid())))
        if moment != moments[-1]:
            kill([chance.choice(groups[-1])])
    job.kill()
    kill(groups[-1])  # a cluster of others' ends them itself, in its own time
    assert [len(group) for group in groups] == [workers] * (KILLS + 1)
    assert len({pid for group in groups for pid in group}) == workers * (KILLS + 1)  # each group is a new one
    assert not (run_dir / "result.json").exists()

    printed = run(arguments)
    assert "resumed from step" in printed
    assert result(run_dir)["workers"] == workers
    assert samples(run_dir) == samples(twin)
    assert weights(run_dir) == weights(twin)


def give_notice(cluster: Any, node: Any, seconds: float) -> None:
    """Tell Ray that the node is to be taken away, as a cloud's notice of a spot node is passed on."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int(1000 * (time.time() + seconds))
    accepted, why = GcsClient(address=cluster.address).drain_node(node.node_id, reason, "spot node", deadline_ms)
    assert accepted, why


@pytest.mark.timeout(900)
def test_nodes_lost_and_regained_and_taken_away_after_a_notice_and_a_stop(cluster: Any, tmp_path: Path) -> None:
    """One worker less, one more, one less, without a sample lost or repeated, then SIGTERM: saved, and status 3."""
    nodes = [add_node(cluster, 1) for _ in range(MOST)]
    run_dir = tmp_path / "small"
    more = ("--launch.workers", f"1..{MOST}", "--launch.address", cluster.address, "--train.epochs", "2000")
    seldom = ("--run.checkpoint-steps", "40", "--run.keep-checkpoints", "1000", "--launch.resize-seconds", "5")
    job = Job(command(tmp_path, *more, *seldom), tmp_path / "job.log")

    def train_on(workers: int, steps: int = 20) -> None:
        """Wait for so many workers, and for more steps of theirs. Their printed lines may come late, or not at all."""
        job.wait_until(lambda: len(train_workers(os.getpid())) == workers)
        before = len(samples(run_dir))
        job.wait_until(lambda: len(samples(run_dir)) >= before + LANES * steps)
        assert len(train_workers(os.getpid())) == workers

    def out_of_turn() -> list[int]:
        """Steps of committed checkpoints that the run's rhythm of 40 steps does not ask for."""
        found = (run_dir / "checkpoints").glob("step_*/committed.json")
        return [step for step in (int(path.parent.name.split("_")[1].split("-")[0]) for path in found) if step % 40]

    train_on(MOST, 50)
    cluster.remove_node(nodes.pop(), allow_graceful=False)
    train_on(MOST - 1)
    nodes.append(add_node(cluster, 1))
    train_on(MOST)
    assert not out_of_turn()

    taken = nodes.pop()
    give_notice(cluster, taken, 600)
    job.wait_until(out_of_turn)
    train_on(MOST, 5)
    cluster.remove_node(taken, allow_graceful=False)  # long before its time, as it happens
    train_on(MOST - 1)
    assert len(out_of_turn()) == 1

    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 3, job.log.read_text()
    said = job.log.read_text()
    stopped_at = int(re.findall(r"asked to stop: saved at step (\d+)", said)[0])
    assert samples(run_dir) == expected_samples(stopped_at)
    assert list((run_dir / "checkpoints").glob(f"step_{stopped_at:08d}-*/committed.json"))
