"""Effect of the options of the loss: many students of one teacher, arm by arm, on CIFAR-100.

    python benchmarks/headline.py --small --data DIR --teacher FILE                 # the twin, on 2 cores: some hours
    python benchmarks/headline.py --data DIR --teacher FILE --epochs 20 --holdout 0.1 --minutes 5          # on a GPU
    python benchmarks/headline.py --data DIR --teacher FILE --epochs 40 --seeds 2 --arms feature_3 best alone kd crd
    python benchmarks/headline.py --small --live --data DIR --teacher FILE                # the twin, on a GPU: minutes

`--data` holds CIFAR-100 as Parquet or class folders, `--teacher` is a weights file of the pair's teacher. Arms
(headline_arms.py) of one seed train together in packs, on the same batches and one teacher pass; the last epoch counts.
The same command resumes, also after a kill; `--minutes` ends it with status 3 in time, with everything saved.

The twin (`--small`): 50 training images of each class, six views of each (crop and flip) whose teacher features are
cached in fp16, a ShuffleNetV2 as teacher, ResNet-8 for 30 epochs. With `--live` the teacher runs in every step, and
`--data` may hold the twin's splits as class folders (train, choose, test). Options are compared on 4,000 other training
images, which the student does not see (the teacher has); the first 4,000 test images are measured once, at the end.

Otherwise: all of CIFAR-100, a live teacher, `--pair` (ResNet-50 -> ShuffleNetV2). With `--holdout 0.1` a tenth of the
training images is held out to choose by; without it, accuracy is that on the test set, on which nothing is chosen.

`--mix cutmix` (or mixup, both with alpha 1) mixes every batch, for all arms alike; the twin then needs `--live`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from headline_arms import ARMS, FIRST
from headline_runs import MIXES, Pack, cache_for, draws, make_twin, protocol, train_together, twin
from headline_table import Study
from report import parser, refresh

from mimkd_ray.config import LossConfig
from mimkd_ray.errors import Interrupted
from mimkd_ray.recipes import CIFAR_PAIRS


def options() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--data", type=Path, required=True, metavar="DIR", help="Parquet files of CIFAR-100")
    made.add_argument("--teacher", type=Path, required=True, metavar="FILE", help="the teacher's weights")
    made.add_argument("--root", type=Path, default=Path("runs/headline"), help="where runs are kept")
    made.add_argument("--small", action="store_true", help="the twin, for a CPU")
    made.add_argument("--live", action="store_true", help="the twin with a live teacher, without a cache")
    made.add_argument("--mix", choices=MIXES, help="mix the images of every batch")
    made.add_argument("--arms", nargs="+", choices=ARMS, default=[], help="(default: all of the twin, else eight)")
    made.add_argument("--seeds", type=int, default=0, help="students of each arm (default: 3 of the twin, else 1)")
    made.add_argument("--seed", type=int, default=0, help="the first seed")
    made.add_argument("--epochs", type=int, default=0, help="of a student (default: 30 of the twin, else 40)")
    made.add_argument("--student", default="cifar/resnet8", help="of the twin")
    made.add_argument("--pair", choices=CIFAR_PAIRS, default="resnet50_shufflenetv2", help="where it is not the twin")
    made.add_argument("--batch", type=int, default=256, help="images in a batch, where it is not the twin")
    made.add_argument("--holdout", type=float, default=0.0, help="share of the training images to choose by")
    made.add_argument("--pack", type=int, default=0, help="arms that train together (default: 3, live 12, else all)")
    made.add_argument(
        "--processes", type=int, default=0, help="packs at a time (default: of the twin the cores, live 2, else 1)"
    )
    made.add_argument("--minutes", type=float, default=0.0, help="end after so many with status 3; 0: at the end")
    made.add_argument("--docs", type=Path, metavar="FILE", help="put the table into this page, between its markers")
    return made.parse_args()


def packs(args: argparse.Namespace) -> Iterator[Pack]:
    """Yield the packs in order: all arms of a seed before those of the next one."""
    root, teacher = args.root.resolve(), str(args.teacher.resolve())
    arms = args.arms or list(ARMS if args.small else FIRST)
    size = args.pack or (12 if args.live else 3 if args.small else len(arms))
    for seed in range(args.seed, args.seed + (args.seeds or (3 if args.small else 1))):
        if args.small:
            data = args.data.resolve() if (args.data / "choose").is_dir() else root / "data"
            base = twin(root, data, teacher, args.student, args.epochs or 30, seed, args.live)
            name = f"twin-{args.student.rpartition('/')[2]}-{args.epochs or 30}{'-live' if args.live else ''}"
        else:
            pair = CIFAR_PAIRS[args.pair]
            base = protocol(pair, str(args.data), teacher, args.epochs or 40, args.batch, seed, args.holdout)
            name = f"{args.pair}-{args.epochs or 40}{'-choose' if args.holdout else ''}"
        if args.mix:
            base, name = replace(base, mix=MIXES[args.mix]), f"{name}-{args.mix}"
        for some in together(arms, size):
            losses = {arm: ARMS[arm] for arm in some}
            if not args.small:
                losses = {arm: replace(loss, queue=LossConfig.queue) for arm, loss in losses.items()}
            yield Pack(name, base, losses, root)


def together(arms: list[str], size: int) -> Iterator[list[str]]:
    """Yield the arms of each pack. Arms that draw random numbers are alone on a GPU: each has its own numbers, and a
    pack of them would not be captured (mimkd_ray/train/engine/engines.py)."""
    drawing = [arm for arm in arms if torch.cuda.is_available() and draws(ARMS[arm])]
    rest = [arm for arm in arms if arm not in drawing]
    for first in range(0, len(rest), size):
        yield rest[first : first + size]
    yield from ([arm] for arm in drawing)


def main() -> int:
    args = options()
    began = time.monotonic()
    at = began + 60 * args.minutes if args.minutes else float("inf")
    todo = list(packs(args))
    if args.small and not (args.data / "choose").is_dir():
        make_twin(args.data, args.root.resolve() / "data")
    if args.small and not args.live:
        cache_for(list(ARMS.values()), todo[0].base, args.threads)
    processes = args.processes or ((2 if args.live else args.threads) if args.small else 1)
    status, done = 0, 0
    with ProcessPoolExecutor(processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        threads = max(1, args.threads // processes)
        running: set[Future] = {pool.submit(train_together, pack, at, threads) for pack in todo}
        while running:
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                try:
                    future.result()
                    done += 1
                    print(f"[{done}/{len(todo)} packs] {(time.monotonic() - began) / 60:.1f} min", flush=True)
                except Interrupted:
                    status = 3
    study = Study.read(todo)
    print(study.text(), flush=True)
    if args.json:
        study.write(args.json, complete=status == 0)
    if args.docs and status == 0:
        refresh(args.docs, study.name, study.markdown())
    return status


if __name__ == "__main__":
    sys.exit(main())
