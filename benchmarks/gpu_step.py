"""Training speed of the headline pair on a GPU: plain steps, captured steps, and packs of captured students.

    python benchmarks/gpu_step.py --data DIR

`--data` holds images of CIFAR-100 as Parquet or class folders; a few thousand are enough, because no accuracy is
measured and the teacher's weights are random. ResNet-50 -> ShuffleNetV2, live teacher, set resident on the device.
Printed: images a second (of all students together), milliseconds a step, and ratios. On a CPU it is a dry run of a few
steps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from headline_arms import ARMS
from headline_runs import protocol
from report import finish, parser

from mimkd_ray.cli.local_launch import LocalContext, pick_device
from mimkd_ray.config import Config, LossConfig
from mimkd_ray.data.sources.data_set import Data, open_data
from mimkd_ray.recipes import CIFAR_PAIRS
from mimkd_ray.train.build import build_network, plan_student
from mimkd_ray.train.captured import WARM_STEPS, make_engine
from mimkd_ray.train.inputs import Inputs
from mimkd_ray.train.student import Student

PACK = ("alone", "kd", "feature_3", "best", "queue")


def measure(config: Config, data: Data, losses: Sequence[LossConfig], steps: int) -> tuple[float, float]:
    """Return the seconds of a step of all students together, and the seconds until the first timed step."""
    began = time.perf_counter()
    context = LocalContext(pick_device(config.launch, 0))
    teacher = build_network(config, data.num_classes, "random")
    configs = [replace(config, loss=replace(loss, queue=LossConfig.queue)) for loss in losses]
    configs.sort(key=lambda one: not one.loss.uses_teacher)
    planned = [plan_student(one, teacher if one.loss.uses_teacher else None, data.num_classes) for one in configs]
    inputs = Inputs(planned, data, teacher, context)
    students = [Student(one, inputs) for one in planned]
    engine = make_engine(students)
    inputs.start(0)

    def run(first: int, count: int) -> None:
        for step in range(first, first + count):
            engine.step(students, step)
        if context.device.type == "cuda":
            torch.cuda.synchronize()

    run(0, 2 * WARM_STEPS)
    ready = time.perf_counter()
    run(2 * WARM_STEPS, steps)
    seconds = (time.perf_counter() - ready) / steps
    inputs.close()
    return seconds, ready - began


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--data", type=Path, required=True, metavar="DIR", help="images of CIFAR-100")
    made.add_argument("--pair", choices=CIFAR_PAIRS, default="resnet50_shufflenetv2")
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    on_gpu = torch.cuda.is_available()
    steps = 100 if on_gpu else 2
    figures: dict[str, float] = {}
    cases: list[tuple[str, int, Literal["plain", "captured"], tuple[str, ...]]] = [
        ("plain_64", 64, "plain", ("feature_3",)),
        ("captured_64", 64, "captured", ("feature_3",)),
        ("alone_256", 256, "captured", ("alone",)),
        ("captured_256", 256, "captured", ("feature_3",)),
        ("pack_256", 256, "captured", PACK),
    ]
    for name, batch, engine, arms in cases:
        batch = batch if on_gpu else batch // 16
        base = protocol(CIFAR_PAIRS[args.pair], str(args.data), "random", 1000, batch, 0, 0.0)
        config = replace(base, train=replace(base.train, engine=engine))
        data = open_data(config.data)
        seconds, first = measure(config, data, [ARMS[arm] for arm in arms], steps)
        figures |= {f"{name}_ms": 1000 * seconds, f"{name}_images_s": batch * len(arms) / seconds}
        figures[f"{name}_setup_s"] = first
        print(f"{name:14} {1000 * seconds:8.2f} ms a step, {batch * len(arms) / seconds:8.0f} images/s", flush=True)
        if on_gpu:
            figures[f"{name}_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
    figures["captured_over_plain_64"] = figures["plain_64_ms"] / figures["captured_64_ms"]
    figures["pack_over_single"] = figures["pack_256_images_s"] / figures["captured_256_images_s"]
    return finish("gpu_step", figures, {"pack_over_single": (">=", 1.6)}, args.json)


if __name__ == "__main__":
    sys.exit(main())
