"""Cost of Ray: images/s of the same loop with and without it, and seconds from process start to first step.

Images/s: one job (digits, ResNet-20 teacher, MIMKD loss, two lanes of 64) on 1 Ray worker against a plain process, and
on 2 Ray workers against two processes of torchrun, with equal threads per worker. The loop measures itself
(`images_per_second` of result.json: without warm-up, evaluation and start).

First step: our job on 2 workers, with the Ray that it starts, against `ray_hello.py`, a TorchTrainer whose workers only
record the time. Ours ends with the first optimiser step done; hello's with its function begun.

Arms take turns, in alternating order, and figures are medians of the rounds' ratios, so that other load on the machine
affects all of them. With other load on 2 cores they still vary by a tenth. About 15 minutes there.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from report import finish, parser, table

ROOT = Path(__file__).resolve().parents[1]
JOB = str(ROOT / "jobs" / "imagenet.py")
HELLO = str(ROOT / "benchmarks" / "ray_hello.py")
TORCHRUN = (sys.executable, str(ROOT / "benchmarks" / "torchrun_here.py"), "--nproc-per-node", "2")

CASE = (
    *(
        "demo",
        "--compare.seeds",
        "0",
        "--data.subset",
        "0",
        "--teacher.allow-chance",
        "true",
        "--teacher.train",
        "false",
        "--student.name",
        "cifar/resnet20",
        "--data.pipeline",
        "none",
    ),
    *("--train.lanes", "2", "--train.lane-batch", "64", "--train.eval-every", "0", "--run.checkpoint-every", "0"),
    *("--train.epochs", "1000", "--run.tensorboard", "false", "--run.name", "run", "--launch.gpu", "off"),
)
RAY = ("--launch.backend", "ray", "--launch.cpus-per-worker", "1", "--launch.max-failures", "0", "--launch.workers")
LOCAL = ("--launch.backend", "local", "--launch.workers", "0")
ARMS: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "plain": ((sys.executable,), LOCAL),
    "ray_1": ((sys.executable,), (*RAY, "1")),
    "torchrun_2": (
        (*TORCHRUN, "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
        LOCAL,
    ),
    "ray_2": ((sys.executable,), (*RAY, "2")),
}
PAIRS = {"ray_1_over_plain": ("ray_1", "plain"), "ray_2_over_torchrun_2": ("ray_2", "torchrun_2")}

STAGES = {
    "parsed": "imports, command line",
    "checked": "checks before the start",
    "imported": "imports",
    "connected": "Ray (ours: with its import)",
    "worker": "controller, workers, process group",
    "data": "opening the data",
    "teacher": "teacher, and its check",
    "cache": "cache, where there is one",
    "built": "student",
    "first_batch": "first batch",
    "first_step": "first step (hello: all from Ray on)",
}


def measure(command: Sequence[str], threads: int) -> float:
    """Run a command to its end; return its start (Unix time)."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "OMP_NUM_THREADS": str(threads),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if HELLO in command:
        environment["RAY_AUTH_MODE"] = "disabled"  # in case there is a token file; ours handles authentication itself
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=900)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return began


def job(arm: str, folder: Path, steps: int, threads: int) -> tuple[float, dict[str, Any]]:
    """Run our job in an arm; return its start, and its result."""
    python, launch = ARMS[arm]
    # Ray gives a worker as many threads as it has CPUs.
    launch = [
        str(threads) if before == "--launch.cpus-per-worker" else word for before, word in pairwise(("", *launch))
    ]
    where = ("--run.root", str(folder), "--train.max-steps", str(steps))
    began = measure([*python, JOB, *CASE, *where, *launch], threads)
    return began, json.loads((folder / "run" / "result.json").read_text())


def throughput(rounds: int, steps: int, threads: int) -> dict[str, float]:
    """Return the images/s of every arm, and the medians of the rounds' ratios."""
    rates: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for count in range(rounds):
        for arm in ARMS if count % 2 == 0 else list(ARMS)[::-1]:
            with tempfile.TemporaryDirectory(prefix="ray-overhead-") as folder:
                rates[arm].append(job(arm, Path(folder), steps, threads)[1]["images_per_second"])
        print(f"round {count + 1}: " + ", ".join(f"{arm} {r[-1]:.0f}" for arm, r in rates.items()), flush=True)
    figures = {f"{arm}_images_per_second": statistics.median(values) for arm, values in rates.items()}
    ratios = {
        name: [a / b for a, b in zip(rates[ray], rates[base], strict=True)] for name, (ray, base) in PAIRS.items()
    }
    rows: list[list[object]] = [
        [name, statistics.median(values), min(values), max(values)] for name, values in ratios.items()
    ]
    print(table(["images/s, same loop", "median", "lowest", "highest"], rows), flush=True)
    # Each arm's least disturbed round, to distinguish a cost of Ray from other load.
    figures |= {f"{name}_best_rounds": max(rates[ray]) / max(rates[base]) for name, (ray, base) in PAIRS.items()}
    return figures | {name: statistics.median(values) for name, values in ratios.items()}


def seconds_by_stage(began: float, marks: Mapping[str, float]) -> dict[str, float]:
    """Return the duration of each stage, in order, and their sum."""
    times = [began, *marks.values()]
    return {name: b - a for name, (a, b) in zip(marks, pairwise(times), strict=True)} | {"all": times[-1] - began}


def start(rounds: int, threads: int) -> dict[str, float]:
    """Return the seconds to the first step, ours and hello's, by stage."""
    seen: dict[str, list[dict[str, float]]] = {"ours": [], "hello": []}
    for count in range(rounds):
        for arm in ("hello", "ours") if count % 2 == 0 else ("ours", "hello"):
            with tempfile.TemporaryDirectory(prefix="ray-overhead-") as name:
                folder = Path(name)
                if arm == "ours":
                    began, result = job("ray_2", folder, 2, threads)
                    marks = result["timeline"]
                else:
                    began = measure([sys.executable, HELLO, str(folder)], threads)
                    marks = json.loads((folder / "marks.json").read_text())
                seen[arm].append(seconds_by_stage(began, marks))
        both = ", ".join(f"{arm} {values[-1]['all']:.1f} s" for arm, values in seen.items())
        print(f"start {count + 1}: {both}", flush=True)
    middle = {
        arm: {stage: statistics.median(v[stage] for v in values) for stage in values[0]} for arm, values in seen.items()
    }
    rows: list[list[object]] = [
        [text, *(f"{middle[arm][stage]:.2f}" if stage in middle[arm] else "" for arm in seen)]
        for stage, text in {**STAGES, "all": "process start to first step"}.items()
    ]
    print(table(["seconds", *seen], rows), flush=True)
    ratios = [a["all"] / b["all"] for a, b in zip(seen["ours"], seen["hello"], strict=True)]
    return {
        **{f"ours_{stage}_seconds": value for stage, value in middle["ours"].items()},
        **{f"hello_{stage}_seconds": value for stage, value in middle["hello"].items()},
        "start_over_hello": statistics.median(ratios),
    }


def main() -> int:
    options = parser(__doc__)
    options.set_defaults(threads=1)
    options.add_argument("--rounds", type=int, default=5, help="rounds of the images/s arms; 0 leaves them out")
    options.add_argument("--steps", type=int, default=150, help="steps of an images/s run")
    options.add_argument("--starts", type=int, default=5, help="rounds of the start; 0 leaves it out")
    args = options.parse_args()
    figures: dict[str, float] = {}
    targets: dict[str, tuple[Any, float]] = {}
    if args.rounds:
        figures |= throughput(args.rounds, args.steps, args.threads)
        targets |= dict.fromkeys(PAIRS, (">=", 0.97))
    if args.starts:
        figures |= start(args.starts, args.threads)
        targets["start_over_hello"] = ("<=", 1.25)
    return finish("ray_overhead", figures, targets, args.json)


if __name__ == "__main__":
    sys.exit(main())
