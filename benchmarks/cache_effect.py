"""Effect of the teacher cache's codecs on training: at one set of weights, and on the trained student.

* Identity: one start of student and critics, the same batches, no training. Relative L2 difference of the teacher's
  features and of the gradient, and relative difference of the loss, between a teacher that runs without any codec and
  cached features: all fp32, all fp16, the default codecs, and those with the 10 largest logits. The last two pool maps
  and leave logits out, which makes another loss; so the effect of rounding is shown separately (`_by_rounding`),
  against a live teacher whose features go through the same codecs.
* Held-out loss: students of several seeds, each trained from the same start on the same batches with a live teacher
  without any codec and from a cache in fp16 and in the default codecs. The result is the distance of the mean
  cross-entropy on held-out images from that of the live arm, in standard deviations of that arm over its seeds. The
  distillation loss that the arm minimises is shown beside it: with another codec it is another loss.

CIFAR-100 (--cifar), a ResNet-20 that is trained on it for a few hundred steps first (or --weights) and a ResNet-8.
Generated images have no classes to learn: without --cifar the figures only show that the script runs. About three
quarters of an hour with one thread beside other work; --steps, --seeds and --teacher-steps shorten it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from cache import NOTHING, small_images
from image_set import write_parquet
from report import finish, parser, table
from safetensors.torch import save_file
from torch import Tensor

from mimkd_ray.cache_build.build_cache import build
from mimkd_ray.cache_build.build_setup import Setup
from mimkd_ray.cache_build.build_units import in_process
from mimkd_ray.cli.local_launch import LocalContext
from mimkd_ray.config import (
    CacheConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TeacherConfig,
    TrainConfig,
)
from mimkd_ray.data.loading.batches import LaneBatch
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.losses.features import Features
from mimkd_ray.recipes import CIFAR_MEAN, CIFAR_STD
from mimkd_ray.taps.tap_codecs import by_label
from mimkd_ray.train.engine.step import backward_lane
from mimkd_ray.train.engine.student import Student, lone_student
from mimkd_ray.train.networks.build import build_network

TEACHER, STUDENT = "cifar/resnet20", "cifar/resnet8"
LANE_BATCH = 64
IDENTITY_ROWS, IDENTITY_STEPS = 1000, 8
HELD_OUT_BATCH = 250


class Codecs(NamedTuple):
    """A way to store features, and its allowed distance from no codec."""

    codecs: tuple[str, ...]
    logits: str
    limit: float | None = None


CODECS = {
    "fp32": Codecs(("maps=fp32", "vectors=fp32"), "fp32", 1e-5),
    "fp16": Codecs(("maps=fp16", "vectors=fp16"), "fp16", 1e-3),
    "default": Codecs((), "fp16"),
    "default_top10": Codecs((), "top10"),
}
TRAINED = ("fp16", "default")


@dataclass(frozen=True)
class Place:
    """The places of a run's files."""

    folder: Path
    data: str
    weights: str


def config_of(place: Place, rows: int, views: int, seed: int = 0) -> Config:
    """Return a live run without any codec. Data and views are the same for every seed."""
    return Config(
        data=DataConfig(
            root=place.data,
            subset=rows,
            pipeline="cifar",
            image_size=32,
            mean=CIFAR_MEAN,
            std=CIFAR_STD,
            views=views,
            view_seed=0,
            store=str(place.folder / "store"),
            loader_workers=0,
        ),
        teacher=TeacherConfig(name=TEACHER, weights=place.weights),
        student=ModelConfig(name=STUDENT),
        loss=LossConfig(kd_weight=1.0),
        optim=OptimConfig(schedule="constant"),
        train=TrainConfig(epochs=1000, lane_batch=LANE_BATCH, seed=seed),
    )


def from_cache(config: Config, place: Place, name: str, live: bool = False) -> Config:
    """Return the same run with features from a cache, or of a live teacher that go through the cache's codecs."""
    own = CODECS[name]
    root = str(place.folder / "cache")
    return replace(config, cache=CacheConfig(root=root, codecs=own.codecs, logits=own.logits, live=live, canary=0.0))


def open_student(config: Config, folder: Path) -> Student:
    """A run at its start, in this process."""
    data, context = open_data(config.data), LocalContext(torch.device("cpu"))
    teacher = None
    if config.loss.uses_teacher:
        teacher = build_network(config, data.num_classes, config.teacher.weights)
    return lone_student(config, data, teacher, context, str(folder))


def trained(student: Student, steps: int) -> None:
    """Train a student for some steps."""
    student.inputs.start(0)
    for step in range(steps):
        student.step(step)


def make_teacher(place: Place, steps: int) -> str:
    """Train the teacher on labels and all images; return its weights file."""
    config = config_of(place, 0, 0)
    student = open_student(
        replace(
            config,
            student=ModelConfig(name=TEACHER),
            loss=NOTHING,
            optim=OptimConfig(lr=0.1, schedule="constant"),
            train=replace(config.train, lane_batch=2 * LANE_BATCH),
        ),
        place.folder,
    )
    trained(student, steps)
    file = place.folder / "teacher.safetensors"
    save_file({name: value.contiguous() for name, value in student.exported().state_dict().items()}, file)
    return str(file)


class Seen(NamedTuple):
    """Features, losses and gradients of a run before any training."""

    features: list[Features]
    losses: list[float]
    gradient: Tensor


def look(config: Config, folder: Path, steps: int) -> Seen:
    """Features, losses and the sum of gradients of the first steps, at the weights of the start."""
    student = open_student(config, folder)
    student.inputs.start(0)
    features, losses = [], []
    for step in range(steps):
        for lane in student.inputs.step(step):
            assert lane.teacher is not None
            features.append(lane.teacher)
            log = backward_lane(student.model, lane.images_BCHW, lane.labels_B, lane.ids_B, lane.teacher, 1.0, True)
            losses.append(float(log["loss"]))
    student.inputs.close()
    gradient = torch.cat([p.grad.flatten() for p in student.distiller.parameters() if p.grad is not None])
    return Seen(features, losses, gradient)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the relative L2 difference."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def worst_feature(ours: Seen, theirs: Seen) -> float:
    """Return the largest relative L2 difference of all taps over all steps."""
    pairs = [(by_label(a), by_label(b)) for a, b in zip(ours.features, theirs.features, strict=True)]
    return max(
        relative(torch.cat([a[tap].flatten() for a, _ in pairs]), torch.cat([b[tap].flatten() for _, b in pairs]))
        for tap in pairs[0][0]
    )


def differences(ours: Seen, theirs: Seen) -> dict[str, float]:
    """Return the relative differences of the loss (the largest of all steps) and of the gradient."""
    losses = [abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True)]
    return {"loss": max(losses), "gradient": relative(ours.gradient, theirs.gradient)}


def identity(place: Place) -> dict[str, float]:
    """Return the differences of each codec from a live teacher without any, and of its rounding alone."""
    plain = config_of(place, IDENTITY_ROWS, 1)
    bare = look(plain, place.folder, IDENTITY_STEPS)
    figures: dict[str, float] = {}
    for name, own in CODECS.items():
        config = from_cache(plain, place, name)
        make_cache(config)
        seen = look(config, place.folder, IDENTITY_STEPS)
        found = differences(seen, bare)
        if own.limit is None:  # features of other shapes or meaning than those without a codec
            coded = look(from_cache(plain, place, name, live=True), place.folder, IDENTITY_STEPS)
            rounding = {"features": worst_feature(seen, coded), **differences(seen, coded)}
            found |= {f"{what}_by_rounding": value for what, value in rounding.items()}
        else:
            found["features"] = worst_feature(seen, bare)
        figures |= {f"{name}/{what}": value for what, value in found.items()}
    return figures


def make_cache(config: Config) -> None:
    """Build a cache in this process."""
    setup = Setup(config, torch.device("cpu"))
    build(setup, in_process(setup))


class HeldOut(NamedTuple):
    """Means over held-out images."""

    cross_entropy: float
    distillation: float


@torch.no_grad()
def held_out(student: Student, rows: int) -> HeldOut:
    """Cross-entropy of the student on the first `rows` held-out images, and the loss that it was trained with."""
    inputs = student.inputs
    assert inputs.teacher is not None
    batches: Iterator[LaneBatch] = islice(inputs.held_out(HELD_OUT_BATCH), max(1, rows // HELD_OUT_BATCH))
    student.distiller.eval()
    losses = []
    for batch in batches:
        images = inputs.normalize(batch.images_BCHW)
        output, logits = student.distiller.output(
            images, batch.labels_B, batch.ids_B, inputs.teacher.features(images), reading=True
        )
        losses.append((float(F.cross_entropy(logits, batch.labels_B)), float(output.total)))
    return HeldOut(*(statistics.fmean(column) for column in zip(*losses, strict=True)))


def train_students(place: Place, args: Any) -> dict[str, list[HeldOut]]:
    """Train a student of each arm and seed, arm by arm within a seed."""
    found: dict[str, list[HeldOut]] = {arm: [] for arm in ("live", *TRAINED)}
    for name in TRAINED:
        began = time.perf_counter()
        make_cache(from_cache(config_of(place, args.rows, args.views), place, name))
        seconds = time.perf_counter() - began
        print(f"cached {args.rows:,} images x {args.views} views, {name}: {seconds:.0f} s", flush=True)
    for seed in range(args.seeds):
        for arm, values in found.items():
            began = time.perf_counter()
            config = config_of(place, args.rows, args.views, seed)
            student = open_student(config if arm == "live" else from_cache(config, place, arm), place.folder)
            trained(student, args.steps)
            values.append(held_out(student, args.held_out))
            student.inputs.close()
            print(
                f"seed {seed}, {arm}: held-out cross-entropy {values[-1].cross_entropy:.4f}, distillation loss "
                f"{values[-1].distillation:.4f} after {args.steps} steps, {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    return found


def compared(found: dict[str, list[HeldOut]]) -> dict[str, float]:
    """Return means and spreads over seeds, and the distance of each cached arm from the live one."""
    figures: dict[str, float] = {}
    for arm, values in found.items():
        for name, column in zip(HeldOut._fields, zip(*values, strict=True), strict=True):
            figures[f"{arm}/held_out_{name}"] = statistics.fmean(column)
            figures[f"{arm}/held_out_{name}_seed_sd"] = statistics.stdev(column) if len(column) > 1 else float("nan")
    own = "held_out_cross_entropy"
    for arm in TRAINED:
        off = abs(figures[f"{arm}/{own}"] - figures[f"live/{own}"])
        figures[f"{arm}/difference_of_means_over_seed_sd"] = off / figures[f"live/{own}_seed_sd"]
    return figures


def data_of(args: Any, folder: Path) -> str:
    """Return CIFAR-100, or generated images in its place."""
    if args.cifar:
        return str(args.cifar)
    print("generated images: what is measured on them means nothing; give --cifar DIR", flush=True)
    for split, rows in (("train", args.rows), ("test", args.held_out)):
        write_parquet(small_images(rows), folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder / "data")


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--cifar", metavar="DIR", help="CIFAR-100 as Parquet files (default: generated images)")
    options.add_argument("--weights", default="", help="weights of the teacher (default: it is trained first)")
    options.add_argument("--teacher-steps", type=int, default=400, help="steps of that training, of 128 images")
    options.add_argument("--seeds", type=int, default=5, help="students of each arm")
    options.add_argument("--steps", type=int, default=500, help="steps of each student, of 64 images")
    options.add_argument("--rows", type=int, default=10_000, help="images that students train on")
    options.add_argument("--views", type=int, default=2, help="views of each image")
    options.add_argument("--held-out", type=int, default=5000, help="held-out images")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="cache-effect-") as name:
        folder = Path(name)
        place = Place(folder, data_of(args, folder), args.weights or "random")
        if not args.weights:
            began = time.perf_counter()
            place = replace(place, weights=make_teacher(place, args.teacher_steps))
            print(f"teacher trained for {args.teacher_steps} steps: {time.perf_counter() - began:.0f} s", flush=True)
        figures = identity(place)
        print(table(["figure", "measured"], [[key, value] for key, value in figures.items()]), flush=True)
        figures |= compared(train_students(place, args))
    targets: dict[str, tuple[Literal[">=", "<="], float]] = {
        f"{name}/{what}": ("<=", own.limit)
        for name, own in CODECS.items()
        if own.limit is not None
        for what in ("features", "loss", "gradient")
    }
    targets |= {f"{arm}/difference_of_means_over_seed_sd": ("<=", 1.0) for arm in TRAINED}
    print("\n" + table(["figure", "measured"], [[key, value] for key, value in figures.items()]))
    return finish("cache_effect", figures, targets, args.json)


if __name__ == "__main__":
    sys.exit(main())
