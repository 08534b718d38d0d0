"""Going on from far inside a run: seconds to the rows of a step, at step 0 and at step 1,000,000, and memory.

The order of 1.28 million and of 1 billion rows in blocks of 256, 8 lanes of 64 rows, windows of 64 blocks. Each
look-up is the first of a fresh process, with nothing cached; places take turns, and figures are medians. Memory is what
a fresh process that looks up both places holds above one that has only imported the same.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from functools import partial
from typing import Any

from children import in_child
from report import finish, parser, table

from mimkd_ray.data.blocks import Blocks
from mimkd_ray.data.order import Order

ROWS = {"1.28 million": 1_281_167, "1 billion": 1_000_000_000}
STEPS = (0, 1_000_000)
LANES, LANE_BATCH, BLOCK_ROWS, WINDOW = 8, 64, 256, 64


def look_up(rows: int, step: int) -> float:
    """Seconds from the row counts to the rows of one lane of a step."""
    began = time.perf_counter()
    Order(Blocks.uniform(rows, BLOCK_ROWS), LANES, LANE_BATCH, seed=0, window=WINDOW).positions(step, LANES - 1)
    return time.perf_counter() - began


def peak_mb(rows: int) -> float:
    """Highest memory of this process, in MB, after looking up both places (none for 0 rows)."""
    for step in STEPS if rows else ():
        look_up(rows, step)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=40, help="look-ups of each place")
    args = options.parse_args()
    idle = in_child(partial(peak_mb, 0))
    figures: dict[str, float] = {}
    targets: dict[str, tuple[Any, float]] = {}
    shown: list[list[object]] = []
    for name, rows in ROWS.items():
        times: dict[int, list[float]] = {step: [] for step in STEPS}
        for number in range(args.rounds):
            for step in STEPS if number % 2 else STEPS[::-1]:
                times[step].append(in_child(partial(look_up, rows, step)))
        near, far = (1e3 * statistics.median(times[step]) for step in STEPS)
        above = in_child(partial(peak_mb, rows)) - idle
        key = name.replace(" ", "_")
        figures |= {f"{key}/step_0_ms": near, f"{key}/step_1000000_ms": far, f"{key}/far_over_near": far / near}
        figures[f"{key}/megabytes"] = above
        targets |= {f"{key}/far_over_near": ("<=", 1.2), f"{key}/megabytes": ("<=", 200)}
        shown.append([name, near, far, far / near, above])
    print(table(["rows", "step 0, ms", "step 1,000,000, ms", "ratio", "MB above imports"], shown))
    return finish("jump", figures, targets, args.json)


if __name__ == "__main__":
    sys.exit(main())
