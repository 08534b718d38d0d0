"""Loss of a node: seconds to the next training step, and their parts.

A Ray cluster of this script on one machine, a head without CPUs and two nodes of one; its settings are those of
cluster/aws.yaml. jobs/imagenet.py trains with --launch.workers 1..2, a worker on each node, until all processes of one
node are killed. Training resumes on the other node, from the last checkpoint.

* noticed: until Ray Train has ended the remaining worker, which then waits for the lost one.
* restarted: until a new worker runs our code (Ray Train's new group, process, imports).
* loaded: data, teacher, student, checkpoint, loader.
* first step: the first batch and its step.

On one machine a killed node's connections end at once. A node whose network is cut is noticed by Ray's health checks:
after 4 s with these settings, and after some 15 s with Ray's own.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from report import finish, parser, table

ROOT = Path(__file__).resolve().parents[1]
CASE = (
    *("demo", "--compare.seeds", "0", "--teacher.train", "false", "--teacher.name", "cifar/resnet8"),
    *("--teacher.allow-chance", "true", "--student.name", "cifar/resnet8_w4", "--data.pipeline", "none"),
    *("--data.subset", "0", "--train.lanes", "2", "--train.lane-batch", "32", "--train.epochs", "500"),
    *("--train.eval-every", "0", "--train.log-every", "10", "--run.checkpoint-every", "0"),
    *("--run.checkpoint-steps", "20", "--run.name", "run", "--run.tensorboard", "false", "--run.log-samples", "true"),
    *("--launch.workers", "1..2", "--launch.cpus-per-worker", "1", "--launch.resize-seconds", "3600"),
)
BEFORE, STEPS = 60, 600  # steps before the loss, and in all
WAIT_SECONDS = 180.0
PARTS = {
    "noticed": "noticed",
    "restarted": "restarted",
    "loaded": "loaded",
    "first_step": "first step",
    "all": "in all",
}


def settings() -> dict[str, str]:
    """Return Ray's settings in cluster/aws.yaml, without authentication, which is not measured here."""
    options = yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text())["docker"]["run_options"]
    pairs = (option.removeprefix("-e ").partition("=") for option in options if option.startswith("-e RAY_"))
    return {name: value for name, _, value in pairs} | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}


def tree(root: int) -> list[int]:
    """Return a process and all its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def trains(pid: int) -> bool:
    """Return whether the process is a worker of Ray Train."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().startswith(b"ray::RayTrainWorker")
    except (FileNotFoundError, ProcessLookupError):
        return False


def steps_done(run: Path) -> int:
    """Return the newest step in the run's log of samples."""
    file = run / "samples.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return next((json.loads(line)["step"] for line in reversed(lines) if line.endswith("}")), 0)


@contextmanager
def cluster() -> Iterator[tuple[str, Any]]:
    """Run the cluster; yield its address, and a node with one CPU that may be killed."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        first, _ = (made.add_node(num_cpus=1) for _ in range(2))
        yield made.address, first
    finally:
        made.shutdown()


def wait(condition: Callable[[], bool], job: subprocess.Popen[bytes], log: Path) -> float:
    """Wait for the condition while the job runs; return the time at which it held."""
    deadline = time.time() + WAIT_SECONDS
    while not condition():
        if job.poll() is not None or time.time() > deadline:
            raise SystemExit(f"the job ended, or takes too long:\n{log.read_text()[-4000:]}")
        time.sleep(0.02)
    return time.time()


def lose(folder: Path) -> dict[str, float]:
    """Lose one node; return the seconds of each part."""
    run, log = folder / "run", folder / "log.txt"
    with cluster() as (address, node):
        command = [sys.executable, str(ROOT / "jobs" / "imagenet.py"), *CASE, "--run.root", str(folder)]
        command += ["--launch.address", address, "--train.max-steps", str(STEPS)]
        with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as job:
            try:
                wait(lambda: steps_done(run) >= BEFORE, job, log)
                lost = tree(node.all_processes["raylet"][0].process.pid)
                left = [pid for pid in tree(os.getpid()) if trains(pid) and pid not in lost]
                if len(left) != 1 or not any(map(trains, lost)):
                    raise SystemExit(f"workers are not where they should be: {left}, {lost}")
                killed = time.time()
                for pid in lost:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                noticed = wait(lambda: not trains(left[0]), job, log)
                if job.wait(WAIT_SECONDS):
                    raise SystemExit(f"the job ended with {job.returncode}:\n{log.read_text()[-4000:]}")
            finally:
                job.kill()
    result = json.loads((run / "result.json").read_text())
    marks = result["timeline"]  # of the last start
    if result["resumed_from"] + 20 < BEFORE or marks["worker"] < killed or result["workers"] != 1:
        raise SystemExit(f"it did not go on with one worker after the loss: {result}")
    times = {
        "noticed": noticed - killed,
        "restarted": marks["worker"] - noticed,
        "loaded": marks["built"] - marks["worker"],
        "first_step": marks["first_step"] - marks["built"],
        "all": marks["first_step"] - killed,
    }
    print(", ".join(f"{PARTS[part]} {seconds:.2f} s" for part, seconds in times.items()), flush=True)
    return times


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=3, help="losses, each in a cluster of its own")
    args = options.parse_args()
    os.environ |= settings()  # before Ray is imported: its processes inherit them
    rounds = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory(prefix="node-loss-") as name:
            rounds.append(lose(Path(name)))
    middle = {part: statistics.median(times[part] for times in rounds) for part in PARTS}
    print(table(["part", "seconds"], [[text, middle[part]] for part, text in PARTS.items()]))
    figures = {f"{part}_seconds": seconds for part, seconds in middle.items()}
    return finish("node_loss", figures, {"all_seconds": ("<=", 30.0)}, args.json)


if __name__ == "__main__":
    sys.exit(main())
