"""Speed of training on one GPU, each figure beside its baseline: captured steps, packs, the loss, and 224 px.

    python benchmarks/gpu_step.py --data DIR

`--data` holds images of CIFAR-100 as Parquet or class folders; some thousands are enough, because no accuracy is
measured and weights are random. Cases (`--cases`):

* headline: ResNet-50 -> ShuffleNetV2 on 32 x 32 images, live teacher, set resident on the device. Plain and captured
  steps at batch 64, and the bare captured loop of the same networks and loss (bare_loop.py). At batch 256: the student
  alone, with KD, with all three terms; five single students, and the five in one pack.
* large: ResNet-34 -> ResNet-18 at 224 px, batch 256, synthetic images on the device, captured, and compiled too; its
  share of 800 TFLOP/s is of the arithmetic of both networks.
* epoch: resnet32x4 -> resnet8x4, cached and live, against the usual public loop (epoch.py; needs pyarrow).
* start: seconds from the start of a process to its first step of the headline pair, without compilation.

About 5 minutes on an H100. On a CPU it is a dry run of a few steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from bare_loop import bare_seconds
from headline_arms import ARMS
from headline_runs import protocol
from report import Targets, finish, parser

from mimkd_ray.cli.local_launch import LocalContext, pick_device
from mimkd_ray.config import Config, LaunchConfig, LossConfig
from mimkd_ray.data.loading.batches import LaneBatch
from mimkd_ray.data.sources.data_set import Data, open_data
from mimkd_ray.recipes import CIFAR_PAIRS, r34_r18
from mimkd_ray.train.cuda_graphs import WARM
from mimkd_ray.train.engine.engines import make_engine
from mimkd_ray.train.engine.inputs import Inputs
from mimkd_ray.train.engine.student import Student
from mimkd_ray.train.networks.build import build_network, plan_student

PACK = ("alone", "kd", "feature_3", "best", "queue")
THREE_TERMS = LossConfig(local_weight=1.0)
TFLOPS = 800.0
"""Arithmetic of a GPU in bf16, for the share of it (an H100's matrix products of 8,192 x 8,192)."""
MACS = {"resnet34": 3.664e9, "resnet18": 1.814e9}
"""Multiply-adds of one 224 px image's forward pass."""
TARGETS: Targets = {
    "captured_over_bare_64": (">=", 0.9),
    "pack_over_singles_256": (">=", 1.6),
    "three_terms_share_256": ("<=", 0.35),
    "three_terms_share_224": ("<=", 0.03),
    "epoch_cached_over_public": (">=", 8.0),
    "epoch_live_over_public": (">=", 5.0),
    "roofline_share_224": (">=", 0.4),
    "first_step_s": ("<=", 20.0),
}
ON_GPU = torch.cuda.is_available()


class Bench:
    """Measures cases and keeps their figures."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.steps = 100 if ON_GPU else 1
        self.figures: dict[str, float] = {}
        self.device = pick_device(LaunchConfig(backend="local"), 0)

    def headline(self, batch: int, engine: Literal["plain", "captured"] = "captured") -> Config:
        """Return the run of the headline pair."""
        made = protocol(CIFAR_PAIRS[self.args.pair], str(self.args.data), "random", 1000, self.scaled(batch), 0, 0.0)
        return replace(made, train=replace(made.train, engine=engine))

    def scaled(self, batch: int) -> int:
        """Return a batch size, on a CPU a smaller one."""
        return batch if ON_GPU else max(4, batch // 64)

    def keep(self, name: str, seconds: float, images: int, setup: float = float("nan")) -> None:
        """Keep and show the time of a step."""
        self.figures |= {f"{name}_ms": 1000 * seconds, f"{name}_images_s": images / seconds, f"{name}_setup_s": setup}
        more = ""
        if ON_GPU:
            self.figures[f"{name}_gib"] = torch.cuda.max_memory_allocated() / 2**30
            more = f", {self.figures[f'{name}_gib']:.2f} GiB"
            torch.cuda.reset_peak_memory_stats()
        print(
            f"{name:20} {1000 * seconds:9.3f} ms, {images / seconds:9.0f} images/s, {setup:5.1f} s before{more}",
            flush=True,
        )

    def measure(
        self, name: str, config: Config, losses: Sequence[LossConfig], batches: Iterator[LaneBatch] | None = None
    ) -> float:
        """Return the seconds of a step of all students of a pack together."""
        began = time.perf_counter()
        data, context = opened(config), LocalContext(self.device)
        teacher = build_network(config, data.num_classes, "random")
        configs = sorted((replace(config, loss=loss) for loss in losses), key=lambda one: not one.loss.uses_teacher)
        planned = [plan_student(one, teacher if one.loss.uses_teacher else None, data.num_classes) for one in configs]
        needs_teacher = any(loss.uses_teacher for loss in losses)
        inputs = Inputs(planned, data, teacher if needs_teacher else None, context)
        students = [Student(one, inputs) for one in planned]
        engine = make_engine(students)
        inputs.start(0, batches)
        warm = 2 * WARM if ON_GPU else 1
        for step in range(warm):
            engine.step(students, step)
        self.wait()
        ready = time.perf_counter()
        for step in range(warm, warm + self.steps):
            engine.step(students, step)
        self.wait()
        seconds = (time.perf_counter() - ready) / self.steps
        if self.args.profile:
            self.profile(name, lambda step: engine.step(students, step), warm + self.steps)
        inputs.close()
        self.keep(name, seconds, config.train.lane_batch * len(losses), ready - began)
        return seconds

    def profile(self, name: str, take: Callable[[int], object], first: int) -> None:
        """Write the ten kernels that take longest in four more steps, and how many there are, to a file."""
        with torch.profiler.profile() as profiler:
            for step in range(first, first + 4):
                take(step)
            self.wait()
        averages = profiler.key_averages()
        order = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
        kernels = sum(one.count for one in averages if one.self_device_time_total > 0) / 4
        text = averages.table(sort_by=order, row_limit=10, max_name_column_width=80)
        self.args.profile.mkdir(parents=True, exist_ok=True)
        (self.args.profile / f"{name}.txt").write_text(f"{name}: {kernels:.0f} kernels a step\n{text}\n")

    def wait(self) -> None:
        """Wait for the device."""
        if ON_GPU:
            torch.cuda.synchronize()

    def headline_pair(self) -> None:
        """Plain, captured and bare steps at batch 64; the terms and a pack at batch 256."""
        accuracy = LossConfig()
        captured = self.measure("captured_64", self.headline(64), [accuracy])
        config = self.headline(64)
        images, labels = torch.randint(0, 256, (4096, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 100, (4096,))
        config = replace(config, data=replace(config.data, num_classes=100))
        bare = bare_seconds(config, images.to(self.device), labels.to(self.device), self.steps)
        self.keep("bare_64", bare, config.train.lane_batch)
        plain = self.measure("plain_64", self.headline(64, "plain"), [accuracy])
        alone, kd, three = (
            self.measure(f"{name}_256", self.headline(256), [loss])
            for name, loss in (("alone", ARMS["alone"]), ("kd", ARMS["kd"]), ("three_terms", THREE_TERMS))
        )
        own = [replace(ARMS[arm], queue=LossConfig.queue) for arm in PACK]
        singles = (
            alone
            + kd
            + sum(
                self.measure(f"{arm}_256", self.headline(256), [loss])
                for arm, loss in zip(PACK[2:], own[2:], strict=True)
            )
        )
        pack = self.measure("pack_256", self.headline(256), own)
        self.figures |= {
            "captured_over_bare_64": bare / captured,
            "captured_over_plain_64": plain / captured,
            "three_terms_share_256": (three - kd) / alone,
            "pack_over_singles_256": singles / pack,
        }

    def large(self) -> None:
        """ResNet-34 -> ResNet-18 at 224 px."""
        made, batch = r34_r18(), self.scaled(256)
        config = replace(
            made,
            data=replace(made.data, root=str(self.args.data), num_classes=1000, pipeline="none", resident="off"),
            train=replace(made.train, lanes=1, lane_batch=batch, engine="captured", compile="off"),
        )
        alone = self.measure("alone_224", config, [LossConfig(name=())], self.synthetic(batch))
        kd = self.measure("kd_224", config, [LossConfig(name=("kd",))], self.synthetic(batch))
        three = self.measure("three_terms_224", config, [THREE_TERMS], self.synthetic(batch))
        accuracy = self.measure("accuracy_224", config, [LossConfig()], self.synthetic(batch))
        arithmetic = 2 * batch * (MACS["resnet34"] + 3 * MACS["resnet18"]) / (TFLOPS * 1e12)
        self.figures |= {"three_terms_share_224": (three - kd) / alone, "roofline_share_224": arithmetic / accuracy}
        if ON_GPU:
            compiled = replace(config, train=replace(config.train, compile="on"))
            seconds = self.measure("compiled_224", compiled, [LossConfig()], self.synthetic(batch))
            self.figures["roofline_share_compiled_224"] = arithmetic / seconds
            self.figures["roofline_share_224"] = max(self.figures["roofline_share_224"], arithmetic / seconds)

    def synthetic(self, batch: int) -> Iterator[LaneBatch]:
        """Yield batches of 224 px that are on the device."""
        generator = torch.Generator(self.device).manual_seed(0)
        draw: dict[str, Any] = {"device": self.device, "generator": generator}
        sets = [
            (
                torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, **draw).to(
                    memory_format=torch.channels_last
                ),
                torch.randint(0, 1000, (batch,), **draw),
                torch.arange(number * batch, (number + 1) * batch, device=self.device),
            )
            for number in range(4)
        ]
        step = 0
        while True:
            yield LaneBatch(step, 0, *sets[step % len(sets)], view=0, damaged=())
            step += 1

    def epoch(self) -> None:
        """The public loop against the product, resnet32x4 -> resnet8x4, batch 64."""
        with tempfile.TemporaryDirectory(prefix="gpu-step-") as folder:
            file = Path(folder) / "epoch.json"
            script = Path(__file__).with_name("epoch.py")
            rows = (
                ["--rows", "12800", "--steps", "100", "--rounds", "3"] if ON_GPU else ["--rows", "512", "--steps", "1"]
            )
            subprocess.run([sys.executable, str(script), "--json", str(file), *rows], check=False)  # 1: targets missed
            found = json.loads(file.read_text())["figures"]
        self.figures |= {f"epoch_{name.replace('/', '_')}": value for name, value in found.items()}

    def start(self) -> None:
        """A process of its own that trains a few steps."""
        with tempfile.TemporaryDirectory(prefix="gpu-step-") as folder:
            began = time.time()
            job = Path(__file__).parent.parent / "jobs" / "cifar100.py"
            command = [sys.executable, str(job), self.args.pair]
            fields = {
                "data.root": self.args.data, "run.root": folder, "run.name": "start", "launch.backend": "local",
                "teacher.weights": "random", "teacher.allow-chance": "true", "train.compile": "off",
                "train.max-steps": 4 if ON_GPU else 1,
                "train.eval-every": 0, "run.tensorboard": "false", "data.val-rows": 200, "train.information-rows": 0,
            }  # fmt: skip
            for name, value in fields.items():
                command += [f"--{name}", str(value)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            marks = json.loads((Path(folder) / "start" / "result.json").read_text())["timeline"]
        self.figures |= {f"start_{stage}_s": at - began for stage, at in marks.items()}
        self.figures["first_step_s"] = marks["first_step"] - began
        print("start: " + ", ".join(f"{stage} {at - began:.1f} s" for stage, at in marks.items()), flush=True)


_opened: dict[Any, Data] = {}


def opened(config: Config) -> Data:
    """Return the data set, opened once, so that it is decoded once."""
    return _opened.setdefault(config.data, open_data(config.data))


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--data", type=Path, required=True, metavar="DIR", help="images of CIFAR-100")
    made.add_argument("--pair", choices=CIFAR_PAIRS, default="resnet50_shufflenetv2")
    made.add_argument("--cases", nargs="+", choices=("headline", "large", "epoch", "start"), default=[])
    made.add_argument("--profile", type=Path, metavar="DIR", help="also write each case's ten longest kernels there")
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    cases: dict[str, Callable[[], None]] = {
        "start": bench.start,
        "headline": bench.headline_pair,
        "large": bench.large,
        "epoch": bench.epoch,
    }
    for name, case in cases.items():
        if args.cases and name not in args.cases:
            continue
        try:
            case()
        except (RuntimeError, subprocess.CalledProcessError, OSError):  # the other cases are still measured
            traceback.print_exc()
    targets = {name: target for name, target in TARGETS.items() if name in bench.figures or not args.cases}
    missing = {name: float("nan") for name in targets.keys() - bench.figures.keys()}
    return finish("gpu_step", bench.figures | missing, targets if ON_GPU else {}, args.json)


if __name__ == "__main__":
    sys.exit(main())
