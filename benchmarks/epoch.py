"""An epoch of CIFAR-100 distillation (ResNet-32x4 -> ResNet-8x4) compared with the usual public code.

* public: a plain re-creation of the usual loop of published code. Pillow images and torchvision's transforms in a
  DataLoader with 8 processes, batch 64, float32, channels first, no compilation; in each step the teacher's forward
  pass, KD, and loss and accuracy brought to the host for the progress line.
* ours, cached: the accuracy loss (all three kinds of term) with cached teacher features, the set resident on the
  device, and the automatic choices of `train.precision`, `channels_last`, `compile` and `engine`.
* ours, live: the same with a live teacher.

All train the same images, batch 64, SGD with momentum. Arms take turns of --steps steps in one process, after a warm-up
that compiles; seconds of an epoch are of 50,000 images at the median rate. The target is for a GPU: on a CPU, where
arithmetic dominates and there are no processes to save, it is shown without one.
"""

from __future__ import annotations

import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import image_set
import torch
import torch.nn.functional as F
from cache import PAIRS, config_of, small_images
from image_set import Encoded
from PIL import Image
from report import Targets, finish, parser, table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from mimkd_ray.cache_build.build_cache import build
from mimkd_ray.cache_build.build_setup import Setup
from mimkd_ray.cache_build.build_units import in_process
from mimkd_ray.cli.local_launch import LocalContext
from mimkd_ray.config import Config
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.models.build_model import build_model
from mimkd_ray.recipes import CIFAR_MEAN, CIFAR_STD
from mimkd_ray.train.engine.engines import make_engine
from mimkd_ray.train.engine.student import lone_student
from mimkd_ray.train.networks.build import build_network

PAIR = PAIRS["resnet32x4_resnet8x4"]
EPOCH = 50_000
WORKERS = 8
WARM_STEPS = 20


class PillowImages(Dataset[tuple[Tensor, int]]):
    """Images in memory, as torchvision's CIFAR100 has them."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self.images = [Image.open(io.BytesIO(row.image)).convert("RGB") for row in rows]
        self.labels = [row.label for row in rows]
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(CIFAR_MEAN, CIFAR_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        return self.transform(self.images[position]), self.labels[position]


class Public:
    """The common loop."""

    def __init__(self, rows: Sequence[Encoded], classes: int, device: torch.device) -> None:
        self.device = device
        self.teacher = build_model(PAIR.teacher, classes).to(device).eval()
        self.student = build_model(PAIR.student, classes).to(device).train()
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        workers = min(WORKERS, os.cpu_count() or 1)
        self.loader = DataLoader(
            PillowImages(rows), batch_size=PAIR.lane_batch, shuffle=True, num_workers=workers, drop_last=True
        )
        self.batches = self._epochs()

    def _epochs(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self.loader

    def turn(self, steps: int) -> float:
        """Return the images/s of this many steps."""
        began = time.perf_counter()
        for _ in range(steps):
            images, labels = next(self.batches)
            images, labels = images.to(self.device), labels.to(self.device)
            logits = self.student(images)
            with torch.no_grad():
                wanted = self.teacher(images)
            kd = F.kl_div(F.log_softmax(logits / 4, dim=1), F.softmax(wanted / 4, dim=1), reduction="batchmean") * 16
            loss = 0.1 * F.cross_entropy(logits, labels) + 0.9 * kd
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.shown = (loss.item(), (logits.argmax(1) == labels).float().mean().item())
        return steps * PAIR.lane_batch / (time.perf_counter() - began)


class Ours:
    """Our student, with its steps."""

    def __init__(self, config: Config, network: torch.nn.Module, folder: Path, device: torch.device) -> None:
        data, context = open_data(config.data), LocalContext(device)
        self.student = lone_student(config, data, network, context, str(folder))
        self.engine = make_engine([self.student])
        self.student.inputs.start(0)
        self.step = 0

    def turn(self, steps: int) -> float:
        """Return the images/s of this many steps."""
        began = time.perf_counter()
        for _ in range(steps):
            self.engine.step([self.student], self.step)
            self.step += 1
        if self.student.context.device.type == "cuda":
            torch.cuda.synchronize()
        return steps * PAIR.lane_batch / (time.perf_counter() - began)


def main() -> int:
    options = parser(__doc__)
    cuda = torch.cuda.is_available()
    options.add_argument("--cifar", metavar="DIR", help="Parquet files of CIFAR-100 (default: generated images)")
    options.add_argument("--rows", type=int, default=EPOCH if cuda else 2048, help="images")
    options.add_argument("--steps", type=int, default=200 if cuda else 8, help="steps of a turn")
    options.add_argument("--rounds", type=int, default=5, help="rounds of all arms")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if cuda else "cpu")
    rows = image_set.images(args.cifar, args.rows) if args.cifar else small_images(args.rows)
    with tempfile.TemporaryDirectory(prefix="epoch-") as name:
        folder = Path(name)
        image_set.write_parquet(rows, folder / "data" / "train-00000-of-00001.parquet")
        config = config_of(PAIR, str(folder / "data"), folder, "random")
        config = replace(config, data=replace(config.data, resident="on"))
        build(Setup(config, device), in_process(Setup(config, device)))
        classes = open_data(config.data).num_classes
        network = build_network(config, classes, "random")
        live = replace(config, cache=replace(config.cache, live=True))
        arms: dict[str, Public | Ours] = {
            "public": Public(rows, classes, device),
            "cached": Ours(config, network, folder, device),
            "live": Ours(live, network, folder, device),
        }
        rates: dict[str, list[float]] = {arm: [] for arm in arms}
        for arm in arms.values():
            arm.turn(WARM_STEPS if cuda else 2)
        for number in range(args.rounds):
            for key in list(arms)[:: 1 if number % 2 == 0 else -1]:
                rates[key].append(arms[key].turn(args.steps))
            print(f"round {number + 1}: " + ", ".join(f"{k} {v[-1]:.0f}" for k, v in rates.items()), flush=True)
    figures = {f"{key}/seconds_per_epoch": EPOCH / statistics.median(values) for key, values in rates.items()}
    for key in ("cached", "live"):
        ratios = [ours / public for ours, public in zip(rates[key], rates["public"], strict=True)]
        figures[f"{key}_over_public"] = statistics.median(ratios)
    print(table(["figure", "measured"], [[key, value] for key, value in figures.items()]))
    targets: Targets = {"cached_over_public": (">=", 8.0), "live_over_public": (">=", 5.0)} if cuda else {}
    return finish("epoch", figures, targets, args.json)


if __name__ == "__main__":
    sys.exit(main())
