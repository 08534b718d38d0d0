"""Threads of a CPU job: images/s with the chosen ones, with OMP_NUM_THREADS=1, and with all cores that wait awake, or
that sleep at once.

The job is a plain process on digits of 8 px, or with `--cifar DIR` on CIFAR-100 (resnet32x4 -> resnet8x4). Arms take
turns, so that what else runs on the machine is the same for all; figures are medians of the rounds' ratios. `--busy N`
runs so many other programs meanwhile.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from report import Targets, finish, parser, table

from mimkd_ray.data.loading.cpu_quota import usable_cores

JOBS = Path(__file__).resolve().parents[1] / "jobs"
DIGITS = shlex.split(
    "imagenet.py demo --student.name cifar/resnet8_w4 --data.pipeline none --compare.seeds 0 --data.subset 0"
)
CIFAR = shlex.split("cifar100.py resnet32x4_resnet8x4 --data.subset 2000 --data.val-rows 64 --data.store-gb 0")
COMMON = shlex.split(
    "--teacher.train false --teacher.allow-chance true --launch.backend local --launch.gpu off --run.name run "
    "--run.tensorboard false --train.information-rows 0 --run.checkpoint-every 0"
)
ARMS: dict[str, dict[str, str]] = {
    "chosen": {},
    "one": {"OMP_NUM_THREADS": "1"},
    "awake": {"OMP_NUM_THREADS": str(usable_cores()), "GOMP_SPINCOUNT": "300000"},  # libgomp's own default
    "asleep": {"OMP_NUM_THREADS": str(usable_cores()), "GOMP_SPINCOUNT": "0"},
}
OURS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SPIN = "while True: pass"


def images_per_second(arm: str, steps: int, cifar: str) -> float:
    """Run the job and return what its result says."""
    environment = {name: value for name, value in os.environ.items() if name not in OURS} | ARMS[arm]
    with tempfile.TemporaryDirectory() as root:
        job, *case = (*CIFAR, "--data.root", cifar) if cifar else DIGITS
        flags = [*case, *COMMON, "--train.max-steps", str(steps), "--run.root", root]
        command = [sys.executable, str(JOBS / job), *flags]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        return float(json.loads(Path(root, "run", "result.json").read_text())["images_per_second"])


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5, help="runs of each arm")
    options.add_argument("--steps", type=int, default=0, help="steps of a run (default: 60, of CIFAR-100 8)")
    options.add_argument("--cifar", default="", metavar="DIR", help="Parquet files of CIFAR-100")
    options.add_argument("--busy", type=int, default=0, help="programs that take a core each meanwhile")
    args = options.parse_args()
    steps = args.steps or (8 if args.cifar else 60)
    rates: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with ExitStack() as others:
        for _ in range(args.busy):
            other = others.enter_context(subprocess.Popen([sys.executable, "-c", SPIN]))
            others.callback(other.kill)
        for count in range(args.rounds):
            for arm in list(ARMS)[:: -1 if count % 2 else 1]:
                rates[arm].append(images_per_second(arm, steps, args.cifar))
    over = {
        arm: statistics.median(a / b for a, b in zip(rates["chosen"], rates[arm], strict=True))
        for arm in ("one", "awake", "asleep")
    }
    print(table(["arm", "images/s"], [[arm, statistics.median(found)] for arm, found in rates.items()]))
    figures = {f"chosen_over_{arm}": ratio for arm, ratio in over.items()}
    figures |= {f"{arm}_images_per_second": statistics.median(found) for arm, found in rates.items()}
    figures |= {"cores": usable_cores(), "busy": args.busy, "load_average": os.getloadavg()[0]}
    targets: Targets = {f"chosen_over_{arm}": (">=", 0.9) for arm in ("one", "awake", "asleep")}
    return finish("threads", figures, targets, args.json)


if __name__ == "__main__":
    sys.exit(main())
