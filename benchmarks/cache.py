"""Cost and savings of the teacher cache: training with it, building it, reading it, and the errors of its codecs.

* Training, images/s of whole steps that share one loader configuration: plain (the student alone), ideal (its
  distillation loss, with features in memory), cached (features read, checked, decoded) and live (the teacher runs).
  All four are up in one process and take turns of a few steps, in alternating order; figures are medians of the
  rounds' ratios.
* Building, images/s of a build in this process (decoding, teacher, encoding, writing, commit) against the teacher's
  forward pass alone on one batch in memory, with the same batch size.
* Reading, MB/s of shuffled batches out of row groups that have been verified, against `read()` of the same files in
  pieces of a batch's size; all in the page cache, and both keep what they read to the end of a pass. The first pass,
  which verifies, is shown beside it.
* Codecs: relative L2 error of storage on the teacher's own maps, and the variance that 256 components retain.

Teachers are random unless --weights is given: speed does not depend on it, but errors do. Images are generated unless
--images or --cifar is given. About 12 minutes on 2 cores.
"""

from __future__ import annotations

import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import image_set
import numpy as np
import torch
from image_set import Encoded
from PIL import Image
from report import finish, parser, table

from mimkd_ray.cache_build.build_cache import build
from mimkd_ray.cache_build.build_setup import Setup
from mimkd_ray.cache_build.build_units import in_process
from mimkd_ray.cli.local_launch import LocalContext
from mimkd_ray.config import CacheConfig, Config, DataConfig, LossConfig, ModelConfig, TeacherConfig, TrainConfig
from mimkd_ray.config.form.codec_spec import parse_spec
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.data.store.block_store import BlockStore
from mimkd_ray.losses.features import Features
from mimkd_ray.recipes import CIFAR_MEAN, CIFAR_STD, IMAGENET_MEAN, IMAGENET_STD
from mimkd_ray.teacher_cache.calibration import Fitter
from mimkd_ray.teacher_cache.codec import Codec, Shape, coded_shape, needs_calibration
from mimkd_ray.teacher_cache.feature_manifest import Error, ViewManifest, publish
from mimkd_ray.teacher_cache.feature_reader import FeatureReader
from mimkd_ray.teacher_cache.writer import write_shard
from mimkd_ray.train.engine.student import lone_student
from mimkd_ray.train.from_cache.fit_codecs import sample_keys
from mimkd_ray.train.networks.build import build_network

CODECS = ("fp32", "fp16", "bf16", "uint8", "pool4,fp16", "pool4,uint8", "pool4,pca256,uint8")
READ_ROWS, READ_BYTES, READ_BLOCK = 65_536, 4096, 256
WARM_STEPS = 2
FORWARDS = 4
NOTHING = LossConfig(global_weight=0, local_weight=0, feature_weight=0)


@dataclass(frozen=True)
class Pair:
    """A teacher and a student, on images of one size."""

    teacher: str
    student: str
    size: int
    steps: int
    """Steps of a turn."""
    lane_batch: int


PAIRS = {
    "mobilenet_v2_shufflenet_v2_x0_5": Pair("mobilenet_v2", "shufflenet_v2_x0_5", 224, 8, 32),
    "resnet32x4_resnet8x4": Pair("cifar/resnet32x4", "cifar/resnet8x4", 32, 20, 64),
    "resnet34_resnet18": Pair("resnet34", "resnet18", 224, 4, 32),
}


def small_images(rows: int) -> list[Encoded]:
    """Generated 32 x 32 PNGs."""
    found = []
    for seed in range(min(rows, image_set.DISTINCT)):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(out, "PNG")
        found.append(Encoded(out.getvalue(), seed % image_set.CLASSES))
    return [found[row % len(found)] for row in range(rows)]


def config_of(pair: Pair, data: str, folder: Path, weights: str) -> Config:
    """Return the cached run of a pair."""
    large = pair.size > 32
    return Config(
        data=DataConfig(
            root=data,
            val_split="train",
            pipeline="imagenet" if large else "cifar",
            image_size=pair.size,
            mean=IMAGENET_MEAN if large else CIFAR_MEAN,
            std=IMAGENET_STD if large else CIFAR_STD,
            views=1,
            num_classes=1000 if large else 0,
            store=str(folder / "store"),
        ),
        teacher=TeacherConfig(name=pair.teacher, weights=weights),
        student=ModelConfig(name=pair.student),
        cache=CacheConfig(root=str(folder / pair.teacher.replace("/", "-")), canary=0.0, calibration_rows=512),
        train=TrainConfig(epochs=1000, lane_batch=pair.lane_batch),
    )


class InMemory:
    """The ideal cache: the features of every batch are in memory."""

    def __init__(self, features: Features) -> None:
        self.features = features

    def decode(self, rows: Mapping[str, Any]) -> Features:
        return self.features


class Arm:
    """A student that takes turns."""

    def __init__(self, config: Config, kind: str, network: torch.nn.Module, folder: Path) -> None:
        if kind == "plain":
            config = replace(config, loss=NOTHING, cache=CacheConfig())
        if kind == "live":
            config = replace(config, cache=replace(config.cache, live=True))
        data, context = open_data(config.data), LocalContext(torch.device("cpu"))
        teacher = None if kind == "plain" else network
        self.student = lone_student(config, data, teacher, context, str(folder))
        self.kind, self.step = kind, 0
        if kind == "ideal":
            self.student.inputs.features = None
            assert self.student.inputs.teacher is not None
            images = torch.randn(config.train.lane_batch, 3, config.data.image_size, config.data.image_size)
            self.student.inputs.decoder = InMemory(self.student.inputs.teacher.features(images))  # type: ignore[assignment]
        self.student.inputs.start(0)

    def turn(self, steps: int) -> float:
        """Return the images/s of this many steps."""
        began = time.perf_counter()
        for _ in range(steps):
            self.student.step(self.step)
            self.step += 1
        return steps * self.student.config.train.lane_batch / (time.perf_counter() - began)


def training(name: str, pair: Pair, config: Config, folder: Path, rounds: int) -> dict[str, float]:
    """Return the median ratios of the arms of a pair."""
    network = build_network(config, open_data(config.data).num_classes, config.teacher.weights)
    arms = [Arm(config, kind, network, folder) for kind in ("plain", "ideal", "cached", "live")]
    rates: dict[str, list[float]] = {arm.kind: [] for arm in arms}
    for arm in arms:
        arm.turn(WARM_STEPS)
    for number in range(rounds):
        for arm in arms if number % 2 == 0 else arms[::-1]:
            rates[arm.kind].append(arm.turn(pair.steps))
        print(f"{name}, round {number + 1}: " + ", ".join(f"{k} {v[-1]:.1f}" for k, v in rates.items()), flush=True)
    for arm in arms:
        arm.batches.close()  # type: ignore[attr-defined]
    figures = {f"{kind}_images_per_second": statistics.median(values) for kind, values in rates.items()}
    for above, below in (("cached", "ideal"), ("cached", "plain"), ("cached", "live")):
        ratios = [a / b for a, b in zip(rates[above], rates[below], strict=True)]
        figures[f"{above}_over_{below}"] = statistics.median(ratios)
    return {f"{name}/{key}": value for key, value in figures.items()}


def building(name: str, config: Config) -> dict[str, float]:
    """Return the images/s of the build, and of the teacher alone; the cache stays for the training arms."""
    setup = Setup(config, torch.device("cpu"))
    seconds: dict[str, float] = {}
    run = in_process(setup)
    before = inference(setup)

    def timed(units: Any, seen: Any) -> Iterator[Any]:
        began = time.perf_counter()
        yield from run(units, seen)
        seconds[type(units[0]).__name__] = time.perf_counter() - began

    built = build(setup, timed)
    alone = (before + inference(setup)) / 2  # before and after, on a machine whose speed may drift
    rate = built.rows / seconds["ShardUnit"]
    print(f"{name}: built at {rate:.1f} images/s, the teacher alone does {alone:.1f}", flush=True)
    return {f"{name}/build_images_per_second": rate, f"{name}/build_over_inference": rate / alone}


def inference(setup: Setup) -> float:
    """Return the images/s of the teacher's forward pass alone."""
    config = setup.config
    teacher = setup.teacher(None)
    images = torch.randn(config.cache.batch, 3, config.data.image_size, config.data.image_size)
    with torch.inference_mode():
        teacher.features(images)
        began = time.perf_counter()
        for _ in range(FORWARDS):
            teacher.features(images)
        seconds = time.perf_counter() - began
    teacher.tapped.release()
    return FORWARDS * config.cache.batch / seconds


def codecs(name: str, config: Config, images: int) -> tuple[dict[str, float], list[list[Any]]]:
    """Return the relative errors of each codec on the maps that the loss reads, fitted on as many other images."""
    setup = Setup(replace(config, cache=replace(config.cache, codecs=())), torch.device("cpu"))
    teacher = setup.teacher(None)
    sight = setup.sight(teacher)
    rows = setup.data.train.num_rows
    keys = sample_keys(rows, min(rows, 2 * images), 1, config.cache.batch)
    with torch.inference_mode():
        maps = [sight.look(batch)[1].maps for batch in sight.batches(keys)]
    figures, lines = {}, []
    for tap in setup.maps:
        own = setup.shapes[tap]
        shape = Shape(own.channels, own.height, own.width)
        for text in CODECS:
            spec = parse_spec(text)
            fitter = Fitter(spec, shape, images, setup.device)
            for features in maps[::2]:
                fitter.add(features[tap])
            numbers = fitter.finish() if needs_calibration(spec, shape) else None
            codec = Codec(spec, shape, numbers, setup.device)
            lost = size = 0.0
            for features in maps[1::2]:
                coded = codec.apply(features[tap])
                lost += float((codec.decode(codec.pack(coded)) - coded).double().square().sum())
                size += float(coded.double().square().sum())
            retained = numbers.retained if numbers is not None else 1.0
            lines.append([f"{name} {tap} {text}", codec.row_bytes, (lost / size) ** 0.5, retained])
            figures[f"{name}/{tap}/{text}/error"] = (lost / size) ** 0.5
            if spec.pca:
                figures[f"{name}/{tap}/{text}/retained"] = retained
    teacher.tapped.release()
    return figures, lines


def pieces(path: Path, size: int) -> Iterator[bytes]:
    """Yield the content of a file by `read()`, in pieces of a batch's size."""
    with path.open("rb", buffering=0) as file:
        while piece := file.read(size):
            yield piece


def reading(folder: Path, rounds: int) -> dict[str, float]:
    """Return the MB/s of verified row groups in shuffled batches, of the pass that verifies them, and of `read()`."""
    root, key = folder / "reading", "0" * 24
    values = np.random.default_rng(0).integers(0, 256, (READ_ROWS, READ_BYTES), dtype=np.uint8)
    ids, shard = np.arange(READ_ROWS), 4096
    counts = (READ_BLOCK,) * (shard // READ_BLOCK)
    records = [
        write_shard(str(root), key, 0, f, ids[f : f + shard], values[f : f + shard], counts, (), Error(0, 1, 0))
        for f in range(0, READ_ROWS, shard)
    ]
    publish(str(root), ViewManifest(key=key, view=0, row_bytes=READ_BYTES, shards=tuple(records)))
    files = sorted(root.rglob("*.parquet"))
    order = np.random.default_rng(1).permutation(READ_ROWS // READ_BLOCK)
    lines = (order[:, None] * READ_BLOCK + np.arange(READ_BLOCK)).reshape(-1, 8 * READ_BLOCK)
    positions = np.random.default_rng(2).permuted(lines, axis=1).reshape(-1, READ_BLOCK)  # inside windows of 8 blocks
    reader = FeatureReader(str(root), {"a:map": key}, READ_ROWS, BlockStore(folder / "reading-store", 10**9))

    def ours() -> float:
        return sum(rows.nbytes for rows in [reader.read(0, batch, batch)["a:map"] for batch in positions])

    def bare() -> float:
        return sum(map(len, [piece for file in files for piece in pieces(file, READ_BLOCK * READ_BYTES)]))

    def speed(work: Callable[[], float]) -> float:
        began = time.perf_counter()
        return work() / 1e6 / (time.perf_counter() - began)

    first = speed(ours)
    bare()
    pairs = [(speed(ours), speed(bare)) for _ in range(rounds)]
    return {
        "read/first_pass_megabytes_per_second": first,
        "read/megabytes_per_second": statistics.median(own for own, _ in pairs),
        "read/bare_megabytes_per_second": statistics.median(plain for _, plain in pairs),
        "read/over_bare": statistics.median(own / plain for own, plain in pairs),
    }


def data_of(pair: Pair, args: Any, folder: Path) -> str:
    """Make the prepared set of a pair's images; return its place."""
    place = folder / f"data-{pair.size}"
    if not place.exists():
        if pair.size > 32:
            rows = image_set.images(args.images, args.rows)
        else:
            rows = image_set.images(args.cifar, 4 * args.rows) if args.cifar else small_images(4 * args.rows)
        image_set.prepared(rows, folder / f"plain-{pair.size}", str(place), 64)
    return str(place)


def main() -> int:
    options = parser(__doc__)
    image_set.add_options(options, rows=512)
    options.add_argument("--cifar", metavar="DIR", help="Parquet files of 32 x 32 images (default: generated)")
    options.add_argument("--weights", default="random", help="weights of the MobileNetV2 teacher, of 1,000 classes")
    options.add_argument("--rounds", type=int, default=5, help="turns of each training arm")
    options.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), help="which teachers and students")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    default = coded_shape(parse_spec("pool4,pca256,uint8"), Shape(1024, 14, 14))
    figures: dict[str, float] = {"default_codec_bytes_14x14x1024": float(default.channels * default.locations)}
    targets: dict[str, tuple[Literal[">=", "<="], float]] = {
        "default_codec_bytes_14x14x1024": ("<=", 4096),
        "read/over_bare": (">=", 0.7),
    }
    lines: list[Sequence[Any]] = []
    with tempfile.TemporaryDirectory(prefix="cache-") as name:
        folder = Path(name)
        figures |= reading(folder, args.rounds)
        for label in args.pairs:
            pair = PAIRS[label]
            weights = args.weights if pair.teacher == "mobilenet_v2" else "random"
            config = config_of(pair, data_of(pair, args, folder), folder, weights)
            figures |= building(label, config)
            targets |= {f"{label}/build_over_inference": (">=", 0.9), f"{label}/cached_over_ideal": (">=", 0.95)}
            errors, rows = codecs(label, config, 256)
            figures |= errors
            lines += rows
            figures |= training(label, pair, config, folder, args.rounds)
        if "resnet34_resnet18" in args.pairs:
            targets |= {"resnet34_resnet18/cached_over_plain": (">=", 0.9)}
    print("\n" + table(["codec", "bytes an image", "relative error", "retained"], lines))
    shown = [[key, value] for key, value in figures.items() if not key.endswith(("/error", "/retained"))]
    print("\n" + table(["figure", "measured"], shown))
    return finish("cache", figures, targets, args.json)


if __name__ == "__main__":
    sys.exit(main())
