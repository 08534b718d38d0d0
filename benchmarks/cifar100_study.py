"""Accuracy on CIFAR-100: the student alone, MIMKD and its rivals, in one harness, several seeds.

    python benchmarks/cifar100_study.py --data DIR                          # the short study: about an hour on 2 cores
    python benchmarks/cifar100_study.py --data DIR --protocol --pairs resnet32x4_resnet8x4 --minutes 9   # on a GPU

`--data` holds CIFAR-100 as Parquet. A teacher is trained once. Every method then gets the same number of tuning trials
(`--tuning`): one seed, over its weight times 1, 1/3, 3, 1/10 and 10 (the student alone: its learning rate times the
root of each), scored on a tenth of the training set that is held out from the student (not from the teacher, which has
seen all of it). The best setting trains `--seeds` students, which are measured on the test set after their last epoch.
Nothing is chosen on the test set. The same command goes on where it was, also after a kill; `--minutes` ends it with
status 3 in time, the last step saved.

The short study: ResNet-8 from a ResNet-20, 4,000 of the 50,000 training images (the teacher sees all of them, 5 times),
10 epochs with a cosine schedule. It shows how methods compare when labels and time are scarce. It does not show the
field's protocol (`--protocol`: all images, 240 epochs, batch 64, rates and milestones of the recipes; `--epochs`
shortens it, milestones in proportion), nor larger networks, nor what more tuning would give to any method.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from deadline import Deadline
from report import parser, refresh
from study_arms import ABLATIONS, METHODS
from study_plan import SHORT, Plan, by_protocol, short
from study_table import Study

from mimkd_ray.cli.local_launch import pick_device
from mimkd_ray.config import LaunchConfig
from mimkd_ray.errors import Interrupted
from mimkd_ray.recipes import CIFAR_RECIPES
from mimkd_ray.train.job import run_job

FIRST = "resnet32x4_resnet8x4"
SHORT_METHODS = ("alone", "kd", "crd", "mimkd_paper", "mimkd", "mimkd_kd")


def options() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--data", required=True, metavar="DIR", help="Parquet files of CIFAR-100")
    made.add_argument("--root", type=Path, default=Path("runs/cifar100-study"), help="where runs are kept")
    made.add_argument("--protocol", action="store_true", help="the field's protocol instead of the short study")
    made.add_argument(
        "--pairs", nargs="+", choices=CIFAR_RECIPES, default=["resnet32x4_resnet8x4"], help="of --protocol"
    )
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(SHORT_METHODS))
    made.add_argument("--ablations", nargs="*", choices=ABLATIONS, default=[], help="needs mimkd among the methods")
    made.add_argument("--seeds", type=int, default=5, help="students of each method")
    made.add_argument("--tuning", type=int, choices=range(6), default=5, help="tuning trials of each method")
    made.add_argument("--epochs", type=int, default=0, help="of a student (default: 10, or the protocol's)")
    made.add_argument("--rows", type=int, default=4000, help="training images of the short study")
    made.add_argument("--minutes", type=float, default=0.0, help="end after so many with status 3; 0: at the end")
    made.add_argument("--readme", action="store_true", help="refresh the table of benchmarks/README.md at the end")
    return made.parse_args()


def main() -> int:
    args = options()
    if args.ablations and "mimkd" not in args.methods:
        raise SystemExit("--ablations change mimkd: name it among --methods, for its tuning and its baseline")
    torch.set_num_threads(args.threads)
    root = args.root.resolve()
    base = (
        {pair: by_protocol(pair, args.data, root, args.epochs) for pair in args.pairs}
        if args.protocol
        else {SHORT: short(args.data, root, args.epochs, args.rows)}
    )
    plan = Plan(base, args.methods, args.ablations, args.seeds, args.tuning, root)
    began = time.monotonic()
    context = Deadline(pick_device(LaunchConfig(), 0), began + 60 * args.minutes if args.minutes else float("inf"))
    done, total = 0, plan.total()
    status = 0
    try:
        for what, config, place in plan.runs():
            known = (place / "result.json").exists()
            if not known and context.stop_requested():
                raise Interrupted("the time is over")
            result = run_job(config, context, str(place))
            done += 1
            if not known:
                spent = (time.monotonic() - began) / 60
                print(f"[{done}/{total}] {what}: {result['student']['top1']:.2f} % ({spent:.1f} min)", flush=True)
    except Interrupted as reason:
        print(f"{reason}: {done} of {total} runs are finished, the same command goes on", flush=True)
        status = 3
    study = Study.read(plan)
    print(study.text(), flush=True)
    study.write(args.json, complete=status == 0)
    if args.readme and status == 0:
        refresh(Path(__file__).resolve().with_name("README.md"), "cifar100", study.markdown())
    return status


if __name__ == "__main__":
    sys.exit(main())
