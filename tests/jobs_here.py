"""Jobs of these tests as processes: started, watched, killed with all that they started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TAKES_LONG = pytest.mark.skipif("MIMKD_TEST_LONG" not in os.environ, reason="takes long: MIMKD_TEST_LONG=1")
"""Tests that `make test` leaves out, so that it stays under 15 minutes on two cores."""

JOB = str(ROOT / "jobs" / "imagenet.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"} | {"RAY_ADDRESS": ""}


CHANCE = ("--teacher.allow-chance", "true")
"""Flag of jobs with a random teacher."""

# Four epochs of five steps: a random teacher, MIMKD's three kinds of term, two lanes, a metrics line per step.
SMALL = (
    *("--compare.seeds", "0", "--teacher.train", "false", "--teacher.name", "cifar/resnet8", "--data.subset", "160"),
    *CHANCE,
    *("--student.name", "cifar/resnet8_w4", "--data.pipeline", "none"),
    *("--train.lanes", "2", "--train.lane-batch", "16", "--train.epochs", "4", "--train.log-every", "1"),
    *("--train.eval-batch", "150", "--train.eval-every", "2", "--train.precision", "float64"),
    *("--train.information-rows", "48"),
    *("--loss.global-weight", "0.1", "--loss.local-weight", "0.1", "--loss.feature-weight", "0.1"),
    *("--loss.critic.width", "16", "--optim.lr", "0.2", "--optim.warmup-epochs", "0"),
    *("--run.checkpoint-every", "1", "--run.name", "small"),
)


def small(root: Path, *more: str) -> list[str]:
    """Arguments of the small job in `root`/small."""
    return ["demo", *SMALL, "--run.root", str(root), *more]


def torchrun(processes: int) -> tuple[str, ...]:
    """The interpreter and arguments that start so many processes on this machine."""
    return (
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)),
        *("--master-addr", "127.0.0.1", "--master-port", "0"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
    )


def run(arguments: list[str], status: int = 0) -> str:
    """Run a job to its end; what it printed."""
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def tree(root: int) -> list[int]:
    """A process and all below it. Ray's daemons and workers are in groups of their own, and would end a short job in
    the second that they take to notice that its driver is gone."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def kill(pids: list[int]) -> None:
    """SIGKILL all of them."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # a child of one that was killed before it
            os.kill(pid, signal.SIGKILL)


def listening(root: int) -> set[tuple[str, int]]:
    """Where a process and all below it listen: ("loopback" or an address as Linux has it, port)."""
    inodes: dict[str, tuple[str, int]] = {}
    for table in ("tcp", "tcp6"):
        for line in (Path("/proc/net") / table).read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            address, _, port = local.partition(":")
            if state == "0A":  # LISTEN
                place = "loopback" if address.endswith("0100007F") else address
                inodes[f"socket:[{rest[5]}]"] = (place, int(port, 16))
    found = set()
    for pid in tree(root):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for link in (Path("/proc") / str(pid) / "fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    found.add(inodes.get(os.readlink(link), ("", 0)))
    return found - {("", 0)}


def processes(root: int, title: str) -> list[int]:
    """Processes below ``root`` to which Ray has given a title that begins so."""
    found = []
    for pid in tree(root):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if (Path("/proc") / str(pid) / "cmdline").read_bytes().startswith(f"ray::{title}".encode()):
                found.append(pid)
    return found


def train_workers(root: int) -> list[int]:
    """Processes below ``root`` in which Ray Train trains."""
    return processes(root, "RayTrainWorker")


class Job:
    """A job in the background whose output goes to a file."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                arguments, stdout=output, stderr=subprocess.STDOUT, env=ENVIRONMENT, start_new_session=True
            )

    def wait_until(self, condition: Callable[[], Any], seconds: float = 200) -> None:
        """Until the condition holds; the job must be running till then."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"it ended too soon:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)

    def end(self, seconds: float = 200) -> int:
        """Its exit status, when it ends by itself."""
        return self.process.wait(seconds)

    def kill(self) -> None:
        """SIGKILL it and every process that it started."""
        kill(tree(self.process.pid))
        self.process.wait()


@contextmanager
def meanwhile(condition: Callable[[], Any], action: Callable[[], Any]) -> Iterator[threading.Event]:
    """Do it once, in a thread, when the condition holds during the with-block; the event says that it was done."""
    over, done = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            if condition():
                done.set()
                action()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def run_and_kill(arguments: list[str], when: Callable[[], bool], log: Path) -> None:
    """Start a job, and SIGKILL it and every process that it started once ``when`` holds."""
    job = Job(arguments, log)
    job.wait_until(when)
    job.kill()


def read_lines(file: Path) -> list[dict[str, Any]]:
    """A file of JSON lines; none yet is none. A line that is being written does not count."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]


def result(run_dir: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    return value


def weights(run_dir: Path) -> bytes:
    return (run_dir / "student.safetensors").read_bytes()
