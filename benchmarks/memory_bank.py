"""CRD's memory bank against MIMKD: seconds a step and peak memory, at the size of CIFAR-100 and of ImageNet.

Forward and backward of the loss alone, on random features and ids, each arm in a separate process:

* crd: the rival of losses/methods/crd.py, two banks of N x 128 and 16,384 negatives an image
* crd_gathered: the same formula in its authors' form, which gathers the rows of all negatives and keeps them for
  the backward pass; the same value and gradient
* mimkd_global: MIMKD's global term, which reads the same vectors
* mimkd: all its terms in their default configuration, so with maps as well, and no bank

Sizes: CIFAR-100 with N = 50,000, batch 64, one 8x8 map of 256 channels in either network; ImageNet with N = 1,281,167,
batch 256, maps of 256 channels at 14x14 and 512 at 7x7. Vectors have 512 channels throughout.

Peak memory is the most that the process holds above what it held before the loss was made, including the features and
their gradients, banks, critics and everything that the backward pass keeps. On a GPU it is of allocated memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from report import Targets, finish, parser, table
from torch import Tensor, nn

from mimkd_ray.config import LossConfig
from mimkd_ray.config.loss_presets import Kind
from mimkd_ray.losses.features import Features
from mimkd_ray.losses.methods.base import RivalTaps, Side, TapPair
from mimkd_ray.losses.methods.crd import CRD, NEGATIVES, TEMPERATURE, TrainingRows
from mimkd_ray.losses.mimkd_loss import MIMKDLoss
from mimkd_ray.losses.terms import Term

VECTOR = 512


@dataclass(frozen=True)
class Size:
    """A data set, its batch, and the maps (channels, height, width) of both networks by stage."""

    images: int
    classes: int
    batch: int
    maps: dict[str, tuple[int, int, int]]


SIZES = {
    "cifar100": Size(50_000, 100, 64, {"stage3": (256, 8, 8)}),
    "imagenet": Size(1_281_167, 1000, 256, {"layer3": (256, 14, 14), "layer4": (512, 7, 7)}),
}


class Gathered(CRD):
    """CRD as its authors wrote it: the rows of all negatives in one tensor, which autograd keeps."""

    def _contrast(self, which: int, own_Bd: Tensor, bank_Nd: Tensor, rows_BK: Tensor) -> Tensor:
        gathered_BKd = bank_Nd.index_select(0, rows_BK.flatten()).view(*rows_BK.shape, -1)
        scores_BK = torch.bmm(gathered_BKd, own_Bd.unsqueeze(2)).squeeze(2) / TEMPERATURE
        with torch.no_grad():
            self._settle(which, scores_BK)
        return self._nce(which, scores_BK)[0].mean()


def crd(size: Size, kind: type[CRD] = CRD, negatives: int = NEGATIVES) -> CRD:
    """Return CRD over all images of a data set."""
    ids = torch.arange(size.images)
    taps = RivalTaps(vectors=(TapPair(Side("pool", VECTOR), Side("pool", VECTOR)),))
    return kind(taps, TrainingRows(ids, ids % size.classes), negatives)


def mimkd(size: Size, kinds: tuple[Kind, ...] = ("global", "local", "feature")) -> MIMKDLoss:
    """Return MIMKD over the vectors, and over the maps if its terms read them."""
    config = LossConfig()
    taps: dict[Kind, list[str]] = {"global": ["pool"], "local": [list(size.maps)[-1]], "feature": list(size.maps)}
    terms = [
        Term(
            kind=kind,
            teacher=tap if kind == "feature" else "pool",
            student=tap,
            weight=config.weight(kind),
            teacher_channels=size.maps[tap][0] if kind == "feature" else VECTOR,
            student_channels=size.maps[tap][0] if tap in size.maps else VECTOR,
        )
        for kind in kinds
        for tap in taps[kind]
    ]
    return MIMKDLoss(config, terms)


ARMS: dict[str, Callable[[Size], nn.Module]] = {
    "crd": crd,
    "crd_gathered": lambda size: crd(size, Gathered),
    "mimkd_global": lambda size: mimkd(size, ("global",)),
    "mimkd": mimkd,
}


def measure(arm: str, size: Size, rounds: int, device: torch.device) -> dict[str, float]:
    """Return the seconds of a step (the least: an absolute time has no partner to take turns with), and MiB at the
    peak, in a separate process."""
    torch.manual_seed(0)
    before = memory_mib(device, "VmRSS")
    loss = ARMS[arm](size).to(device)
    maps = size.maps if arm == "mimkd" else {}

    def features() -> Features:
        return Features(
            torch.randn(size.batch, size.classes, device=device),
            {"pool": torch.randn(size.batch, VECTOR, device=device)},
            {tap: torch.randn(size.batch, *shape, device=device) for tap, shape in maps.items()},
        )

    teacher, student = features(), features()
    leaves = [*student.vectors.values(), *student.maps.values()]
    seconds = []
    for _ in range(rounds + 1):  # the first warms up
        ids_B = torch.randperm(size.images)[: size.batch].to(device)
        for leaf in leaves:
            leaf.grad = None
            leaf.requires_grad_()
        loss.zero_grad(set_to_none=True)
        synchronise(device)
        began = time.perf_counter()
        value = loss(teacher, student, ids_B % size.classes, ids_B)
        (value if isinstance(value, Tensor) else value.total).backward()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return {"seconds": min(seconds[1:]), "peak_mib": memory_mib(device, "VmHWM") - before}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory_mib(device: torch.device, what: str) -> float:
    """Return memory now (VmRSS) or at the peak (VmHWM), from Linux for this process, or from PyTorch for a GPU."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated() if what == "VmHWM" else torch.cuda.memory_allocated()) / 2**20
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 2**10
    raise RuntimeError(f"/proc/self/status has no {what}: this benchmark needs Linux")


def same_value_and_gradient() -> float:
    """Return the largest relative difference of both forms of CRD on a small set in float64, over three steps and with
    both ways to score: it shows that they are one loss."""
    worst = 0.0
    for negatives in (64, 4):  # the bank is multiplied as a whole, or its rows are gathered
        seen = []
        for kind in (CRD, Gathered):
            torch.manual_seed(0)
            loss = crd(Size(100, 5, 8, {}), kind, negatives).double()
            vectors = torch.randn(2, 8, VECTOR, dtype=torch.float64)
            found = []
            for _ in range(3):
                own = vectors[0].clone().requires_grad_()
                ids_B = torch.randperm(100)[:8]
                sides = (Features(own.new_zeros(8, 5), {"pool": each}, {}) for each in (vectors[1], own))
                value = loss(*sides, ids_B % 5, ids_B)
                (gradient,) = torch.autograd.grad(value, own)
                found.append(torch.cat([value.detach().view(1), gradient.flatten()]))
            seen.append(torch.stack(found))
        worst = max(worst, float((seen[0] - seen[1]).norm() / seen[1].norm()))
    return worst


def main() -> int:
    options = parser(__doc__)
    cuda = torch.cuda.is_available()
    options.add_argument("--rounds", type=int, default=20 if cuda else 7, help="steps that are timed")
    options.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    options.add_argument("--one", nargs=2, metavar=("ARM", "SIZE"), help="measure one arm here (used by itself)")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(measure(args.one[0], SIZES[args.one[1]], args.rounds, torch.device(args.device))))
        return 0
    figures: dict[str, float] = {"crd_forms_differ_by": same_value_and_gradient()}
    common = ["--rounds", str(args.rounds), "--device", args.device, "--threads", str(args.threads)]
    for name, size in SIZES.items():
        rows: list[list[object]] = []
        for arm in ARMS:
            command = [sys.executable, __file__, "--one", arm, name, *common]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            rows.append([arm, found["seconds"] * 1e3, found["peak_mib"]])
            figures |= {f"{name}/{arm}/{key}": value for key, value in found.items()}
        for key in ("seconds", "peak_mib"):
            for arm in ("mimkd_global", "mimkd"):
                figures[f"{name}/{arm}_over_crd/{key}"] = figures[f"{name}/{arm}/{key}"] / figures[f"{name}/crd/{key}"]
        print(f"{name}: N = {size.images:,}, batch {size.batch}, {args.device}")
        print(table(["loss alone, forward + backward", "ms", "peak MiB"], rows), "\n", flush=True)
    targets: Targets = {
        "crd_forms_differ_by": ("<=", 1e-9),
        "cifar100/mimkd_global_over_crd/seconds": ("<=", 1.0),
        "imagenet/mimkd_global_over_crd/seconds": ("<=", 1.0),
        "imagenet/mimkd_over_crd/peak_mib": ("<=", 1.0),
    }
    return finish("memory_bank", figures, targets, args.json)


if __name__ == "__main__":
    sys.exit(main())
