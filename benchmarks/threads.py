"""Threads of a CPU job: images/s with the chosen ones, with OMP_NUM_THREADS=1, and with all cores that wait awake.

The job is jobs/imagenet.py on the digits in a plain process. Arms take turns, so that what else runs on the machine is
the same for all; figures are medians of the rounds' ratios. `--busy N` runs so many other programs meanwhile.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from report import Targets, finish, parser, table

from mimkd_ray.data.loading.cpu_quota import usable_cores

JOB = Path(__file__).resolve().parents[1] / "jobs" / "imagenet.py"
CASE = (
    *("demo", "--compare.seeds", "0", "--data.subset", "0", "--teacher.train", "false"),
    *("--teacher.allow-chance", "true", "--launch.backend", "local", "--launch.gpu", "off", "--run.name", "run"),
    *("--run.tensorboard", "false", "--train.information-rows", "0", "--run.checkpoint-every", "0"),
)
ARMS: dict[str, dict[str, str]] = {
    "chosen": {},
    "one": {"OMP_NUM_THREADS": "1"},
    "awake": {"OMP_NUM_THREADS": str(usable_cores()), "GOMP_SPINCOUNT": "300000"},  # libgomp's own default
}
OURS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SPIN = "while True: pass"


def images_per_second(arm: str, steps: int) -> float:
    """Run the job and return what its result says."""
    environment = {name: value for name, value in os.environ.items() if name not in OURS} | ARMS[arm]
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, str(JOB), *CASE, "--train.max-steps", str(steps), "--run.root", root]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        return float(json.loads(Path(root, "run", "result.json").read_text())["images_per_second"])


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5, help="runs of each arm")
    options.add_argument("--steps", type=int, default=60, help="steps of a run")
    options.add_argument("--busy", type=int, default=0, help="programs that take a core each meanwhile")
    args = options.parse_args()
    rates: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with ExitStack() as others:
        for _ in range(args.busy):
            other = others.enter_context(subprocess.Popen([sys.executable, "-c", SPIN]))
            others.callback(other.kill)
        for count in range(args.rounds):
            for arm in list(ARMS)[:: -1 if count % 2 else 1]:
                rates[arm].append(images_per_second(arm, args.steps))
    over = {
        arm: statistics.median(a / b for a, b in zip(rates["chosen"], rates[arm], strict=True))
        for arm in ("one", "awake")
    }
    print(table(["arm", "images/s"], [[arm, statistics.median(found)] for arm, found in rates.items()]))
    figures = {f"chosen_over_{arm}": ratio for arm, ratio in over.items()}
    figures |= {f"{arm}_images_per_second": statistics.median(found) for arm, found in rates.items()}
    figures |= {"cores": usable_cores(), "busy": args.busy, "load_average": os.getloadavg()[0]}
    targets: Targets = {"chosen_over_one": (">=", 0.9)}
    return finish("threads", figures, targets, args.json)


if __name__ == "__main__":
    sys.exit(main())
