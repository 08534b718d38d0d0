"""Workers against images/s on this machine: 1, 2 and 4 of them, for a compute-bound and an input-bound run.

The same run (four lanes, so the same samples and the same global batch) with its lanes dealt to torchrun's processes,
one thread each; images/s of jobs/imagenet.py from result.json.

* compute: ResNet-20 on digits of 32 px in memory, a live teacher: no loader processes.
* input: photographs of 341 x 256, decoded for a student of 8 px that takes almost no time; one loader process a worker.

The result shows the use of the machine's cores: beyond their number nothing is gained, and it should not get much
worse. scaling_model.py adds the network. Arms take turns; figures are medians of the rounds' ratios.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import image_set
from ray_overhead import JOB, TORCHRUN
from report import Targets, finish, parser, table

WORKERS = (1, 2, 4)
COMMON = (
    *("demo", "--compare.seeds", "0", "--data.subset", "0", "--teacher.train", "false", "--train.lanes", "4"),
    *("--train.epochs", "1000", "--train.eval-every", "0", "--run.checkpoint-every", "0", "--run.tensorboard", "false"),
    *("--run.name", "run", "--launch.gpu", "off", "--launch.backend", "local", "--launch.workers", "0"),
    *("--train.information-rows", "0", "--teacher.allow-chance", "true"),
    *("--student.name", "cifar/resnet8_w4", "--data.pipeline", "none"),
)
CASES = {
    "compute": (
        *("--data.image-size", "32", "--student.name", "cifar/resnet20", "--teacher.name", "cifar/resnet20"),
        *("--train.lane-batch", "16"),
    ),
    "input": (
        *("--data.pipeline", "cifar", "--data.loader-workers", "1", "--train.lane-batch", "32"),
        *("--data.val-split", "train", "--loss.global-weight", "0", "--loss.local-weight", "0"),
        *("--loss.feature-weight", "0"),
    ),
}


def rate(case: str, workers: int, steps: int, data: Path) -> float:
    """Return the images/s of a run."""
    own = CASES[case] + (("--data.root", str(data), "--data.store", str(data / "store")) if case == "input" else ())
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        command = [*_start(workers), JOB, *COMMON, *own, "--run.root", folder, "--train.max-steps", str(steps)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=900)
        if done.returncode:
            raise SystemExit(f"{case} with {workers} workers ended with {done.returncode}:\n{done.stderr[-3000:]}")
        return float(json.loads((Path(folder) / "run" / "result.json").read_text())["images_per_second"])


def _start(workers: int) -> Sequence[str]:
    if workers == 1:
        return (sys.executable,)
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1")
    return (*TORCHRUN[:-1], str(workers), *meeting)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--images", metavar="DIR", help="Parquet files or class folders (default: generated JPEGs)")
    options.add_argument("--rounds", type=int, default=3, help="rounds of all arms")
    options.add_argument("--steps", type=int, default=40, help="steps of a run")
    args = options.parse_args()
    rates: dict[tuple[str, int], list[float]] = {(case, n): [] for case in CASES for n in WORKERS}
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        data = Path(name)
        image_set.write_parquet(image_set.images(args.images, 2048), data / "train-00000-of-00001.parquet")
        for number in range(args.rounds):
            for case, workers in list(rates)[:: 1 if number % 2 == 0 else -1]:
                rates[case, workers].append(rate(case, workers, args.steps, data))
            last = ", ".join(f"{case} {n} {found[-1]:.0f}" for (case, n), found in rates.items())
            print(f"round {number + 1}: {last}", flush=True)
    figures: dict[str, float] = {}
    rows: list[list[object]] = []
    for case in CASES:
        line: list[object] = [case]
        for workers in WORKERS:
            figures[f"{case}/{workers}_workers_images_per_second"] = statistics.median(rates[case, workers])
            over = [n / one for n, one in zip(rates[case, workers], rates[case, 1], strict=True)]
            figures[f"{case}/{workers}_workers_over_one"] = statistics.median(over)
            line += [round(statistics.median(rates[case, workers])), statistics.median(over)]
        rows.append(line)
    print(table(["images/s", *(text for n in WORKERS for text in (f"{n} workers", "over one"))], rows))
    targets: Targets = {}
    return finish("scaling", figures, targets, args.json)


if __name__ == "__main__":
    sys.exit(main())
