"""The same job in a plain process, under torchrun and under Ray; killed and resumed; and stopped."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs_here import (
    ENVIRONMENT,
    JOB,
    TAKES_LONG,
    Job,
    kill,
    listening,
    read_lines,
    result,
    run,
    run_and_kill,
    small,
    train_workers,
    tree,
    weights,
)
from jobs_here import torchrun as torchrun_here
from safetensors.torch import load_file

from mimkd_ray.cli import command_line
from mimkd_ray.config import Config
from mimkd_ray.config.form.json_form import from_dict
from mimkd_ray.models.build_model import build_model
from mimkd_ray.recipes import IMAGENET_RECIPES


def command(root: Path, *more: str, python: tuple[str, ...] = (sys.executable,)) -> list[str]:
    return [*python, JOB, *small(root, *more)]


def committed(run_dir: Path, count: int) -> bool:
    """Return whether ``count`` epochs have been saved."""
    return any((run_dir / "checkpoints").glob(f"step_{5 * count:08d}-*/committed.json"))


def lines(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(run_dir / "metrics.jsonl") if line["kind"] == kind]


def run_here(arguments: list[str]) -> int:
    """The job in this very process, whose start costs nothing; its exit status."""
    before, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    torch.set_num_threads(1)  # as the other processes have it
    try:
        return command_line.main(IMAGENET_RECIPES, "demo", arguments)
    finally:
        signal.signal(signal.SIGTERM, before)
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run in one process, which carries both lanes."""
    root = tmp_path_factory.mktemp("plain")
    assert run_here(small(root, "--launch.backend", "local", "--launch.workers", "1")) == 0
    return root / "small"


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run in two processes of torchrun."""
    root = tmp_path_factory.mktemp("torchrun")
    run(command(root, "--launch.backend", "local", python=torchrun_here(2)))
    return root / "small"


def on_terminal(command: list[str], columns: int) -> tuple[int, str, set[tuple[str, int]]]:
    """Run a command on a terminal of its own; return its status, what it wrote, and where it listened meanwhile."""
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe(command[0], command, ENVIRONMENT)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    written, listened = b"", set[tuple[str, int]]()
    try:
        while part := os.read(terminal, 65536):
            written += part
            if b"held-out top-1" in part:
                listened |= listening(child)
    except OSError:  # it has ended
        pass
    except BaseException:  # of a test's time limit
        kill(tree(child))
        raise
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), written.decode(errors="replace"), listened


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The undisturbed run on two workers of a Ray of its own, and what it wrote on a terminal."""
    root = tmp_path_factory.mktemp("ray")
    status, said, listened = on_terminal(command(root, "--launch.workers", "2"), 140)
    assert status == 0, said
    assert "student cifar/resnet8_w4" in said
    assert len({port for place, port in listened if place == "loopback"}) > 5
    assert {place for place, _ in listened} == {"loopback"}
    return root / "small", said


@pytest.fixture
def under_ray(on_ray: tuple[Path, str]) -> Path:
    """The undisturbed run on two workers of a Ray of its own."""
    return on_ray[0]


def assert_equal_training(one: Path, other: Path) -> None:
    """Equal losses (1e-8), the same learning rates, and the same held-out figures."""
    ours, theirs = lines(one, "train"), lines(other, "train")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, 21))
    losses = [key for key in ours[0] if key in ("loss", "ce") or key.endswith(("/loss", "/nats"))]
    assert len(losses) >= 6, "two kinds of term"
    for a, b in zip(ours, theirs, strict=True):
        assert a["lr"] == b["lr"]
        for key in losses:
            assert a[key] == pytest.approx(b[key], rel=1e-8, abs=1e-12), (a["step"], key)
    first, last = lines(one, "eval")[-1], lines(other, "eval")[-1]
    assert (first["step"], first["epoch"], first["rows"]) == (last["step"], last["epoch"], last["rows"]) == (20, 4, 450)
    assert first["top1"] == last["top1"]
    assert first["cross_entropy"] == pytest.approx(last["cross_entropy"], rel=1e-7)
    assert result(one)["digests"] == result(other)["digests"]


@TAKES_LONG
def test_two_processes_of_torchrun_equal_one_process(plain: Path, torchrun: Path) -> None:
    assert (result(plain)["workers"], result(torchrun)["workers"]) == (1, 2)
    assert lines(plain, "train")[0]["loss"] != lines(plain, "train")[-1]["loss"]
    assert_equal_training(plain, torchrun)


@pytest.mark.ray
@pytest.mark.slow
def test_two_ray_workers_equal_one_process(plain: Path, under_ray: Path) -> None:
    assert result(under_ray)["workers"] == 2
    assert_equal_training(plain, under_ray)


@pytest.mark.ray
@pytest.mark.slow
@TAKES_LONG
def test_two_workers_are_two_workers_whoever_starts_them(torchrun: Path, under_ray: Path) -> None:
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
    launched = ["parsed", "checked", "connected", "worker"]
    assert stages == [*launched, "data", "teacher", "cache", "built", "first_batch", "first_step"]
    assert sorted(values["timeline"].values()) == list(values["timeline"].values())
    student = build_model("cifar/resnet8_w4", 10).double()
    student.load_state_dict(load_file(under_ray / "student.safetensors"))
    assert student.eval()(torch.rand(2, 3, 8, 8).double()).isfinite().all()
    events = list((under_ray / "tensorboard").glob("events.out.tfevents.*"))
    assert events
    assert all(file.stat().st_size > 100 for file in events)
    assert not (under_ray / "error.json").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_the_driver_has_the_bar_and_rays_lines_are_in_a_file(on_ray: tuple[Path, str]) -> None:
    run_dir, said = on_ray
    text = re.sub(r"\x1b\[\w", "", said).replace("\r", "\n")
    assert re.search(r"^demo +\d+%\|[#█▏▎▍▌▋▊▉ ]{20}\| \d+ of 20 steps", text, re.M), text
    assert re.search(r"^cross-entropy \d.*global\S* [-\d.]+ of at most", text, re.M), text
    for line in ("starting Ray", "starting workers", "2 workers on CPU.*", "demo: epoch 2, held-out top-1.*"):
        assert len(re.findall(f"^{line}$", text, re.M)) == 1, text
    assert "pid=" not in text
    assert "RayTrainWorker" not in text
    log = (run_dir / "ray.log").read_text()
    assert "RayTrainWorker" in log
    assert "demo: epoch" not in log


@TAKES_LONG
def test_a_killed_plain_job_ends_with_the_weights_of_an_undisturbed_run(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(tmp_path, "--launch.backend", "local", "--launch.workers", "1")
    run_dir = tmp_path / "small"
    run_and_kill(arguments, lambda: committed(run_dir, 1), tmp_path / "killed.log")
    assert not (run_dir / "result.json").exists()
    assert run_here(arguments[2:]) == 0
    assert 5 <= result(run_dir)["resumed_from"] < 20
    assert weights(run_dir) == weights(plain)
    assert [line["step"] for line in lines(run_dir, "train")] == list(range(1, 21)), "each step once"
    capsys.readouterr()
    assert run_here(arguments[2:]) == 0
    assert capsys.readouterr().out.count("this run was finished before") == 1
    assert weights(run_dir) == weights(plain)


STOPPED = (
    *("--launch.backend", "local", "--train.epochs", "8", "--train.eval-every", "0", "--run.checkpoint-every", "0"),
)
"""Long enough to be stopped, and saved then only."""


def test_sigterm_saves_and_ends_with_status_three_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As batch systems do it: mid-epoch."""
    assert run_here(small(tmp_path / "twin", *STOPPED)) == 0
    run_dir, over = tmp_path / "stopped" / "small", threading.Event()

    def stop() -> None:
        while not over.wait(0.01):
            if len(lines(run_dir, "train")) >= 12:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    stopper = threading.Thread(target=stop)
    stopper.start()
    try:
        assert run_here(small(tmp_path / "stopped", *STOPPED)) == 3
    finally:
        over.set()
        stopper.join()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "asked to stop: saved at step" in said
    assert not (run_dir / "result.json").exists()
    assert run_here(small(tmp_path / "stopped", *STOPPED)) == 0
    assert 12 <= result(run_dir)["resumed_from"] < 40
    assert weights(run_dir) == weights(tmp_path / "twin" / "small")


@TAKES_LONG
def test_sigterm_saves_under_torchrun_too(tmp_path: Path) -> None:
    run_dir = tmp_path / "small"
    job = Job(command(tmp_path, *STOPPED, python=torchrun_here(2)), tmp_path / "job.log")
    job.wait_until(lambda: len(lines(run_dir, "train")) >= 12)
    listened = set[tuple[str, int]]().union(*(listening(worker) for worker in tree(job.process.pid)[1:]))
    assert {place for place, _ in listened} == {"loopback"}, "all but torchrun itself"
    job.process.send_signal(signal.SIGTERM)
    assert job.end() != 0
    assert "asked to stop: saved at step" in job.log.read_text()
    assert not (run_dir / "result.json").exists()
    assert list((run_dir / "checkpoints").glob("*/committed.json"))


@TAKES_LONG
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("Ray", marks=pytest.mark.ray)])
def test_stopped_loader_processes_of_any_worker_do_not_hold_up_a_stop(launcher: str, tmp_path: Path) -> None:
    long = ("--train.epochs", "2000", "--run.checkpoint-every", "0", "--data.loader-workers", "1")
    where = ("--launch.workers", "2") if launcher == "Ray" else ("--launch.backend", "local")
    python = (sys.executable,) if launcher == "Ray" else torchrun_here(2)
    job = Job(command(tmp_path, *long, *where, python=python), tmp_path / "log")
    try:
        job.wait_until(lambda: len(lines(tmp_path / "small", "train")) >= 3, 400)
        root = job.process.pid
        workers = train_workers(root) if launcher == "Ray" else tree(root)[1:3]
        loaders = {pid for worker in workers for pid in tree(worker)[1:]}
        assert len(loaders) == 2
        for loader in loaders:
            os.kill(loader, signal.SIGSTOP)
        before = -1
        while (step := len(lines(tmp_path / "small", "train"))) > before:  # what was ready is trained with
            before = step
            time.sleep(10)  # on a slow machine a step takes seconds
        job.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        job.end(100)  # less than the limit after which a run ends without saving
        assert time.monotonic() - began > 5, "they were not stuck"
        assert "asked to stop: saved at step" in job.log.read_text()
    finally:
        if job.process.poll() is None:
            job.kill()
