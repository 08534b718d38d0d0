"""Cost of lanes: a step of k lanes on one worker against one batch of the same number of images, k = 1, 2, 4, 8.

The same loop, loss and networks; only the cut differs. A lane is a smaller batch for the processor, and has its own
batch-norm statistics and critics' scores (fewer pairs: k lanes of B/k images have B*B/k). Arms take turns; figures are
medians of the rounds' ratios.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from made_students import make_student
from report import finish, parser, table

LANES = (1, 2, 4, 8)


def main() -> int:
    options = parser(__doc__)
    cuda = torch.cuda.is_available()
    options.add_argument("--batch", type=int, default=512 if cuda else 64, help="images of a step, over all lanes")
    options.add_argument("--size", type=int, default=224 if cuda else 64, help="height and width of the images")
    options.add_argument("--steps", type=int, default=10 if cuda else 3, help="steps of an arm in a round")
    options.add_argument("--rounds", type=int, default=7, help="rounds of all arms")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if cuda else "cpu")
    arms = {k: make_student("resnet34", "resnet18", k, args.batch // k, args.size, device) for k in LANES}
    done = dict.fromkeys(LANES, 0)

    def seconds(k: int, steps: int) -> float:
        began = time.perf_counter()
        for step in range(done[k], done[k] + steps):
            arms[k].step(step)
        done[k] += steps
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / steps

    for k in LANES:
        seconds(k, 2)
    times: dict[int, list[float]] = {k: [] for k in LANES}
    for count in range(args.rounds):
        for k in LANES if count % 2 == 0 else LANES[::-1]:
            times[k].append(seconds(k, args.steps))
        print(
            f"round {count + 1}: " + ", ".join(f"{k} lanes {1e3 * t[-1]:.0f} ms" for k, t in times.items()), flush=True
        )
    ratios = {k: statistics.median(a / b for a, b in zip(times[k], times[1], strict=True)) for k in LANES}
    rows: list[list[object]] = [
        [f"{k} x {args.batch // k}", 1e3 * statistics.median(times[k]), ratios[k]] for k in LANES
    ]
    print(table(["lanes", "ms a step", "over one batch"], rows))
    figures = {f"{k}_lanes_over_one_batch": ratios[k] for k in LANES[1:]}
    figures |= {f"{k}_lanes_ms": 1e3 * statistics.median(times[k]) for k in LANES}
    return finish("lanes", figures, {}, args.json)


if __name__ == "__main__":
    sys.exit(main())
