"""The same job in a plain process, under torchrun and under Ray; killed and resumed; and how Ray's errors arrive."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs_here import JOB, Job, read_lines, result, run, weights
from jobs_here import torchrun as torchrun_here
from safetensors.torch import load_file

from mimkd_ray import cli
from mimkd_ray.models.zoo import build_model
from mimkd_ray.recipes import IMAGENET_RECIPES
from mimkd_ray.train.config import Config, from_dict

# Four epochs of five steps: a random teacher, MIMKD's three kinds of term, two lanes, a metrics line per step.
SMALL = (
    *("--compare.seeds", "0", "--teacher.train", "false", "--teacher.name", "cifar/resnet8", "--data.subset", "160"),
    *("--train.lanes", "2", "--train.lane-batch", "16", "--train.epochs", "4", "--train.log-every", "1"),
    *(
        "--train.eval-batch",
        "150",
        "--train.eval-every",
        "2",
        "--train.precision",
        "float64",
        "--loss.critic.width",
        "16",
    ),
    *("--loss.global-weight", "0.1", "--loss.local-weight", "0.1", "--optim.warmup-epochs", "0"),
    *("--run.checkpoint-every", "1", "--run.name", "small"),
)


def command(root: Path, *more: str, python: tuple[str, ...] = (sys.executable,)) -> list[str]:
    return [*python, JOB, "demo", *SMALL, "--run.root", str(root), *more]


def run_and_kill(arguments: list[str], when: Callable[[], bool], log: Path) -> None:
    """Start a job, and SIGKILL it and every process that it started once ``when`` holds."""
    job = Job(arguments, log)
    job.wait_until(when)
    job.kill()


def committed(run_dir: Path, count: int) -> bool:
    """Whether ``count`` epochs have been saved."""
    return any((run_dir / "checkpoints").glob(f"step_{5 * count:08d}-*/committed.json"))


def lines(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(run_dir / "metrics.jsonl") if line["kind"] == kind]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run in one process, which carries both lanes."""
    root = tmp_path_factory.mktemp("plain")
    run(command(root, "--launch.backend", "local", "--launch.workers", "1"))
    return root / "small"


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run in two processes of torchrun."""
    root = tmp_path_factory.mktemp("torchrun")
    run(command(root, "--launch.backend", "local", python=torchrun_here(2)))
    return root / "small"


@pytest.fixture(scope="module")
def under_ray(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on two Ray workers, killed between two checkpoints and started again by the same command."""
    root = tmp_path_factory.mktemp("ray")
    run_dir = root / "small"
    # At the first of four checkpoints: what is left must take longer than it takes to notice.
    run_and_kill(command(root), lambda: committed(run_dir, 1), root / "killed.log")
    assert not (run_dir / "result.json").exists()
    printed = run(command(root))
    assert "resumed from step" in printed
    assert "student cifar/resnet8_w4" in printed
    return run_dir


def assert_equal_training(one: Path, other: Path) -> None:
    """Equal losses (1e-8), the same learning rates, and the same held-out figures."""
    ours, theirs = lines(one, "train"), lines(other, "train")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, 21))
    losses = [key for key in ours[0] if key in ("loss", "ce") or key.endswith(("/loss", "/nats"))]
    assert len(losses) > 6, "three kinds of term"
    for a, b in zip(ours, theirs, strict=True):
        assert a["lr"] == b["lr"]
        for key in losses:
            assert a[key] == pytest.approx(b[key], rel=1e-8, abs=1e-12), (a["step"], key)
    first, last = lines(one, "eval")[-1], lines(other, "eval")[-1]
    assert (first["step"], first["epoch"], first["rows"]) == (last["step"], last["epoch"], last["rows"]) == (20, 4, 450)
    assert first["top1"] == last["top1"]
    assert first["cross_entropy"] == pytest.approx(last["cross_entropy"], rel=1e-7)
    assert result(one)["digests"] == result(other)["digests"]


def test_two_processes_of_torchrun_equal_one_process(plain: Path, torchrun: Path) -> None:
    assert (result(plain)["workers"], result(torchrun)["workers"]) == (1, 2)
    assert lines(plain, "train")[0]["loss"] != lines(plain, "train")[-1]["loss"]
    assert_equal_training(plain, torchrun)


@pytest.mark.ray
@pytest.mark.slow
def test_two_ray_workers_equal_one_process(plain: Path, under_ray: Path) -> None:
    assert result(under_ray)["workers"] == 2
    assert 5 <= result(under_ray)["resumed_from"] < 20
    assert_equal_training(plain, under_ray)


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_ray_job_ends_with_the_weights_of_an_undisturbed_run(torchrun: Path, under_ray: Path) -> None:
    """Bit for bit, and with an undisturbed torchrun at that: two workers are two workers, whoever starts them."""
    assert weights(under_ray) == weights(torchrun)


@pytest.mark.ray
@pytest.mark.slow
def test_the_run_directory_is_complete(under_ray: Path) -> None:
    config = from_dict(Config, json.loads((under_ray / "config.json").read_text()))
    assert config.train.lane_batch == 16
    values = result(under_ray)
    assert values["teacher"]["name"] == "cifar/resnet8"
    assert 0 <= values["student"]["top1"] <= values["student"]["top5"] <= 100
    assert values["nats"]
    assert {"torch", "ray", "python"} <= set(values["versions"])
    stages = list(values["timeline"])
    assert stages == ["parsed", "checked", "connected", "worker", "built", "first_step"]
    assert sorted(values["timeline"].values()) == list(values["timeline"].values())
    student = build_model("cifar/resnet8_w4", 10).double()
    student.load_state_dict(load_file(under_ray / "student.safetensors"))
    assert student.eval()(torch.rand(2, 3, 8, 8).double()).isfinite().all()
    events = list((under_ray / "tensorboard").glob("events.out.tfevents.*"))
    assert events
    assert all(file.stat().st_size > 100 for file in events)
    assert not (under_ray / "error.json").exists()


def test_a_killed_plain_job_ends_with_the_weights_of_an_undisturbed_run(plain: Path, tmp_path: Path) -> None:
    arguments = command(tmp_path, "--launch.backend", "local", "--launch.workers", "1")
    run_dir = tmp_path / "small"
    run_and_kill(arguments, lambda: committed(run_dir, 1), tmp_path / "killed.log")
    assert not (run_dir / "result.json").exists()
    run(arguments)
    assert 5 <= result(run_dir)["resumed_from"] < 20
    assert weights(run_dir) == weights(plain)
    assert [line["step"] for line in lines(run_dir, "train")] == list(range(1, 21)), "each step once"
    assert run(arguments).count("this run was finished before") == 1
    assert weights(run_dir) == weights(plain)


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
    status = cli.main(IMAGENET_RECIPES, "demo", [*SMALL, "--run.root", str(root), "--launch.address", address, *more])
    program = f"{sys.argv[0]}: "
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(program)]
    file = root / "small" / "error.json"
    return status, said, json.loads(file.read_text()) if file.exists() else None


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
    """With the default number of restarts: the first restart ends the job, as it cannot mend anything."""
    status, said, left = answer(capsys, tmp_path, cluster, "--teacher.expect-top1", "95")
    assert status == 2
    assert len(said) == 1
    assert "teacher cifar/resnet8 with weights random reaches" in said[0]
    assert "95.00 % was expected" in said[0]
    assert left is not None
    assert left["kind"] == "UserError"
    assert not (tmp_path / "small" / "metrics.jsonl").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_one_line_and_status_one(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without restarts, whose error takes another way to the driver."""
    more = ("--optim.lr", "1e200", "--launch.max-failures", "0")
    status, said, left = answer(capsys, tmp_path, cluster, *more)
    assert status == 1
    assert len(said) == 1
    assert "the loss is" in said[0]
    assert "sample ids" in said[0]
    assert "--optim.lr" in said[0]
    assert left is not None
    assert left["kind"] == "NonFiniteLossError"


def test_sigterm_saves_and_ends_with_status_three_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """As batch systems do it: mid-epoch, in a plain process and under torchrun."""
    more = (
        "--launch.backend",
        "local",
        "--train.epochs",
        "60",
        "--train.eval-every",
        "0",
        "--run.checkpoint-every",
        "0",
    )
    run(command(tmp_path / "twin", *more))
    for name, python in {"plain": (sys.executable,), "torchrun": torchrun_here(2)}.items():
        run_dir = tmp_path / name / "small"
        job = Job(command(tmp_path / name, *more, python=python), tmp_path / f"{name}.log")
        job.wait_until(lambda folder=run_dir: len(lines(folder, "train")) >= 12)
        job.process.send_signal(signal.SIGTERM)
        status = job.end()
        said = job.log.read_text()
        assert "asked to stop: saved at step" in said
        assert not (run_dir / "result.json").exists()
        if name == "plain":
            assert status == 3
            run(command(tmp_path / name, *more))
            assert result(run_dir)["resumed_from"] >= 12
            assert weights(run_dir) == weights(tmp_path / "twin" / "small")
