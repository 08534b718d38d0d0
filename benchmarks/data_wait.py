"""Share of a step's time for which an accelerator waits for data.

The accelerator is a sleep: after each batch of 64 it takes as long as consumes 0.8 of the bare decode rate of the
loader's processes, which is measured just before, in the same round. These are one less than the machine has cores, as
by default: a core is the training process's. Images are prepared shards at 224 px on local disk, and on an S3 server on
this machine behind a proxy that keeps each request for 30 ms. The block store is empty at the beginning of each pass,
and windows of 2 blocks of 128 rows in a set of 64 blocks make the loader fetch a new block every second step all the
time. The server decodes nothing, but it takes its part of the same cores.

The first 16 steps do not count: processes start in them and the first blocks arrive, once in a run. Nothing else is
left out. Local and S3 take turns, in alternating order; figures are medians over rounds. About 2 minutes on 2 cores.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import image_set
import torch
from children import in_child
from report import Targets, finish, parser, table
from s3_here import BUCKET, s3_server, turn_to

from mimkd_ray.config import DataConfig
from mimkd_ray.data.loading.loader import train_batches
from mimkd_ray.data.order.sample_order import Order
from mimkd_ray.data.sources.data_set import open_data

BATCH = 64
BLOCK_ROWS = 128
WINDOW = 2  # blocks
SKIPPED = 16  # steps
USE = 0.8  # of the bare decode rate
LATENCY_S = 0.03


class Wait(NamedTuple):
    """Waiting times of the counted steps of one pass."""

    share: float  # of their time spent in next(batches)
    longest_s: float  # wait for a batch
    steps: int


def wait(root: str, workers: int, images_per_second: float) -> Wait:
    """Take batches as the accelerator would, starting with an empty block store."""
    step_s = BATCH / images_per_second
    waits, steps = [], []
    with tempfile.TemporaryDirectory(prefix="blocks-") as store:
        source = open_data(DataConfig(root=root, val_split="train", store=f"{store}/blocks")).train
        order = Order(source.blocks, 1, BATCH, seed=0, window=WINDOW)
        batches = train_batches(
            source,
            DataConfig(pipeline="imagenet", image_size=image_set.SIZE, views=0, loader_workers=workers),
            order,
            0,
            lanes=[0],
            start_step=0,
            stop_step=order.steps_per_epoch,
        )
        began = time.perf_counter()
        # `batch` is kept while the accelerator works, as in training.
        while (batch := next(batches, None)) is not None:
            taken = time.perf_counter()
            time.sleep(step_s)
            assert len(batch) == BATCH
            ended = time.perf_counter()
            waits.append(taken - began)
            steps.append(ended - began)
            began = ended
    waits, steps = waits[SKIPPED:], steps[SKIPPED:]
    return Wait(sum(waits) / sum(steps), max(waits), len(waits))


def main() -> int:
    options = parser(__doc__)
    image_set.add_options(options, rows=8192)
    options.add_argument("--rounds", type=int, default=5, help="rounds of both places")
    options.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="loader processes")
    args = options.parse_args()
    torch.set_num_threads(1)  # of this process and those forked from it: processes share the cores
    rows = image_set.images(args.images, args.rows)
    waits: dict[str, list[Wait]] = {"local": [], "s3": []}
    bare: list[float] = []
    with tempfile.TemporaryDirectory(prefix="data-wait-") as name, s3_server(LATENCY_S) as server:
        folder = Path(name)
        roots = {"local": str(folder / "prepared"), "s3": f"s3://{BUCKET}/set"}
        for root in roots.values():
            in_child(partial(image_set.prepared, rows, folder / "plain", root, BLOCK_ROWS))
        turn_to(server.late)
        for number in range(args.rounds):
            bare.append(in_child(partial(image_set.bare_rate, rows, args.workers, BATCH)))
            for place in roots if number % 2 == 0 else list(roots)[::-1]:
                run: Callable[[], Wait] = partial(wait, roots[place], args.workers, USE * bare[-1])
                waits[place].append(in_child(run))
            print(
                f"round {number + 1}: bare {bare[-1]:.0f} images/s, "
                + ", ".join(f"{place} {found[-1].share:.2%}" for place, found in waits.items()),
                flush=True,
            )
    figures = {"bare_images_per_second": statistics.median(bare)}
    shown: list[list[object]] = []
    for place, found in waits.items():
        shares = [w.share for w in found]
        figures[f"{place}_data_wait_share"] = statistics.median(shares)
        figures[f"{place}_longest_wait_seconds"] = statistics.median(w.longest_s for w in found)
        longest = f"{figures[f'{place}_longest_wait_seconds'] * 1e3:.1f}"
        shown.append([place, f"{statistics.median(shares):.2%}", f"{min(shares):.2%}", f"{max(shares):.2%}", longest])
    print(table(["data wait", "median", "lowest", "highest", "longest, ms"], shown), flush=True)
    targets: Targets = {"local_data_wait_share": ("<=", 0.03), "s3_data_wait_share": ("<=", 0.03)}
    return finish("data_wait", figures, targets, args.json)


if __name__ == "__main__":
    sys.exit(main())
