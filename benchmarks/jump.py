"""Resuming far inside a run: seconds to the first decoded batch, at step 0 and at step 1,000,000, and memory.

A set of 1.28 million and of 1 billion rows in blocks of 256, in which every row is one of a few JPEGs; 8 lanes of 64
images at 224 pixels, windows of 64 blocks. Each start is the first of a fresh process, which opens the set, finds the
rows of the step, starts the loader (its own number of processes by default, or none) and takes its first batch; places
take turns, and figures are medians. The rows of a step alone are measured as well: a slow jump could be hidden by the
start of processes.

Memory is the highest of the whole tree of processes in half a second after such a start, in which the loader fills its
batches, above that with a child that has imported the same and waits. Pages that processes share count once.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from children import in_child, tree
from image_set import SIZE, add_options, images
from report import finish, parser, table

from mimkd_ray.config import DataConfig
from mimkd_ray.data.loading.loader import train_batches
from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.data.order.sample_order import Order
from mimkd_ray.data.sources.source import Row, Source

ROWS = {"1.28 million": 1_281_167, "1 billion": 1_000_000_000}
STEPS = (0, 1_000_000)
LANES, LANE_BATCH, BLOCK_ROWS, WINDOW = 8, 64, 256, 64
MORE_STEPS = 1000
"""Steps that the run still has ahead: the loader works ahead, as it does in training."""
LOADERS = {"by default": -1, "none": 0}
"""Loader processes."""
STAY_SECONDS = 0.5
"""Seconds for which memory is measured after the first batch, while the loader makes all batches that it may make
ahead."""


class Endless(Source):
    """A source of any number of rows, each of them one of a few encoded images. Reading costs nothing; decoding is
    real."""

    classes = tuple(f"class {number}" for number in range(1000))
    digest = "endless"

    def __init__(self, num_rows: int, encoded: Sequence[bytes]) -> None:
        self.num_rows, self.encoded = num_rows, encoded
        self.blocks = Blocks.uniform(num_rows, BLOCK_ROWS)

    def labels(self) -> np.ndarray:
        """Return all labels: 8 bytes a row."""
        return np.arange(self.num_rows) % len(self.classes)

    def label_range(self) -> tuple[int, int]:
        """Return the bounds of the labels."""
        return 0, len(self.classes) - 1

    def read(self, positions: Sequence[int]) -> list[Row]:
        """Return the rows at the positions."""
        return [
            Row(p, p % len(self.classes), self.encoded[p % len(self.encoded)], f"row {p}") for p in map(int, positions)
        ]


def order_of(rows: int) -> Order:
    """Return the order of this many rows."""
    return Order(Blocks.uniform(rows, BLOCK_ROWS), LANES, LANE_BATCH, seed=0, window=WINDOW)


def look_up(rows: int, step: int) -> float:
    """Return the seconds from the row counts to the rows of one lane of a step."""
    began = time.perf_counter()
    order_of(rows).positions(step, LANES - 1)
    return time.perf_counter() - began


def first_batch(rows: int, step: int, encoded: Sequence[bytes], loader_workers: int, stay: float = 0) -> float:
    """Return the seconds from a closed set to the first decoded batch of a step. The loader works on for `stay`
    more."""
    torch.set_num_threads(1)  # OpenMP's others, which an import has started, did not come along in the fork
    began = time.perf_counter()
    source = Endless(rows, encoded)
    batches = train_batches(
        source,
        DataConfig(pipeline="imagenet", image_size=SIZE, views=0, loader_workers=loader_workers),
        order_of(rows),
        0,
        lanes=range(LANES),
        start_step=step,
        stop_step=step + MORE_STEPS,
    )
    batch = next(batches)
    seconds = time.perf_counter() - began
    assert batch.step == step
    assert batch.images_BCHW.shape == (LANE_BATCH, 3, SIZE, SIZE)
    time.sleep(stay)
    return seconds  # the loader's processes end with its generator, here


def tree_mb() -> float:
    """Return the memory of this process and all its descendants now, in MB; a page that several share counts once."""
    total = 0
    for pid in tree(os.getpid()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += int(rollup.partition("\nPss:")[2].split()[0])
    return total / 1e3


def highest_mb(function: Callable[[], object]) -> float:
    """Return the highest memory of the tree while a child calls the function."""
    peak = 0.0

    def look() -> None:
        nonlocal peak
        peak = max(peak, tree_mb())

    in_child(function, look)
    return peak


def in_turn(rounds: int, seconds: Callable[..., float]) -> tuple[float, float]:
    """Return the median milliseconds of `seconds(step=...)` at both steps, each time in a fresh process."""
    times: dict[int, list[float]] = {step: [] for step in STEPS}
    for number in range(rounds):
        for step in STEPS if number % 2 else STEPS[::-1]:
            times[step].append(1e3 * in_child(partial(seconds, step=step)))
    near, far = (statistics.median(times[step]) for step in STEPS)
    return near, far


def main() -> int:
    options = parser(__doc__)
    add_options(options, rows=64)
    options.add_argument("--rounds", type=int, default=40, help="starts of each kind at each place")
    args = options.parse_args()
    encoded = [row.image for row in images(args.images, args.rows)]
    idle = highest_mb(partial(time.sleep, STAY_SECONDS))
    figures: dict[str, float] = {"imports_megabytes": idle}
    targets: dict[str, tuple[Any, float]] = {}
    shown: list[list[object]] = []

    def add(key: str, label: str, near: float, far: float, above: object) -> None:
        figures.update({f"{key}/step_0_ms": near, f"{key}/step_1000000_ms": far, f"{key}/far_over_near": far / near})
        targets[f"{key}/far_over_near"] = ("<=", 1.2)
        shown.append([label, near, far, far / near, above])

    for name, rows in ROWS.items():
        key = name.replace(" ", "_")
        near, far = in_turn(args.rounds, partial(look_up, rows))
        add(f"{key}/rows", f"{name}: rows of a step", near, far, "")
        for loader, workers in LOADERS.items():
            start = partial(first_batch, rows, encoded=encoded, loader_workers=workers)
            near, far = in_turn(args.rounds, start)
            above = max(highest_mb(partial(start, step=step, stay=STAY_SECONDS)) for step in STEPS) - idle
            place = f"{key}/loader_{loader.replace(' ', '_')}"
            add(place, f"{name}: first batch, loader processes {loader}", near, far, above)
            figures[f"{place}/megabytes"] = above
            targets[f"{place}/megabytes"] = ("<=", 200)
    print(table(["", "step 0, ms", "step 1,000,000, ms", "ratio", "MB above imports"], shown))
    return finish("jump", figures, targets, args.json)


if __name__ == "__main__":
    sys.exit(main())
