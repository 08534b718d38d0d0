"""Exact distributed evaluation: every held-out row counts once, whatever the number of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mimkd_ray import console
from mimkd_ray.config import DataConfig
from mimkd_ray.data.loading.batches import LaneBatch
from mimkd_ray.data.loading.damaged_images import damaged_allowed
from mimkd_ray.data.sources.source import Source
from mimkd_ray.errors import DamagedDataError, UserError
from mimkd_ray.losses.features import Features
from mimkd_ray.models.train_or_eval import in_mode
from mimkd_ray.train.distributed import all_sum
from mimkd_ray.train.networks.student_module import Normalizer, StudentModule
from mimkd_ray.train.networks.teacher import Teacher
from mimkd_ray.train.out_of_memory import K, each

OTHER_ROWS = "name another split with --data.val-split, or hold out a part of the training rows with --data.holdout 0.1"
GRADIENT_IMAGES = 32
"""Images of an evaluation that gradient norms are taken on: a reading scores all locations of a map, of which training
has a few, and a graph keeps what every one of them made."""


class Accuracy(NamedTuple):
    """Held-out figures. top-1 and top-5 in percent; top-5 is 100 for 5 classes and fewer; NaN without any label."""

    top1: float
    top5: float
    cross_entropy: float
    rows: int
    damaged: int


def told_batches(
    batches: Iterable[LaneBatch], source: Source, world_size: int, what: str, said: bool = False, rows: int = 0
) -> Iterator[LaneBatch]:
    """The batches of one rank, told on the console as a part of all. ``said``: also that they begin. ``rows``: as many
    of each rank are asked for; 0: all."""
    total = min(source.num_rows, world_size * rows or source.num_rows)
    return console.counted(batches, lambda batch: world_size * len(batch), what, total, said)


def held_out_name(data: DataConfig) -> str:
    """Name the held-out set of ``data``, for errors."""
    if data.holdout:
        return f"the held-out part of {data.root} (data.holdout {data.holdout} of split '{data.train_split}')"
    return f"the validation set of {data.root} (data.val_split '{data.val_split}')"


def accuracy(
    logits_of: Callable[[Tensor], Tensor],
    batches: Iterable[LaneBatch],
    normalize: Normalizer,
    max_damaged: float = 0.0,
    name: str = "the held-out set",
    remedy: str = OTHER_ROWS,
) -> Accuracy:
    """Top-1, top-5 and cross-entropy over the batches of all ranks. Damaged images are left out and counted.

    ``name`` is the set's, for errors, ``remedy`` what to do if it is empty. Raises, on all ranks alike,
    DamagedDataError if more images are damaged than ``max_damaged`` allows (``data.loading.damaged_images``), and
    UserError if no image is left.
    """
    return accuracies({0: logits_of}, batches, normalize, max_damaged, name, remedy=remedy)[0]


@torch.no_grad()
def accuracies(
    networks: Mapping[K, Callable[[Tensor], Tensor]],
    batches: Iterable[LaneBatch],
    normalize: Normalizer,
    max_damaged: float = 0.0,
    name: str = "the held-out set",
    failed: dict[K, str] | None = None,
    remedy: str = OTHER_ROWS,
) -> dict[K, Accuracy]:
    """:func:`accuracy` of several networks in one pass over the batches. ``failed``: see :func:`each`; for one rank."""
    sums_N5 = torch.zeros(len(networks), 5, dtype=torch.float64, device=normalize.device)
    sums = dict(zip(networks, sums_N5, strict=True))

    def add(key: K, images: Tensor, labels_B: Tensor) -> None:
        logits_BC = networks[key](images).float()
        best_BK = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices
        hit_BK = best_BK == labels_B.unsqueeze(1)
        sums[key][0] += hit_BK[:, 0].sum()
        sums[key][1] += hit_BK.sum()
        sums[key][2] += F.cross_entropy(logits_BC, labels_B, reduction="sum")
        sums[key][3] += len(labels_B)

    unreadable: list[str] = []
    for batch in batches:
        unreadable += batch.damaged
        sums_N5[:, 4] += len(batch.damaged)
        if not len(batch):
            continue
        labels_B = batch.labels_B.to(normalize.device, non_blocking=True)
        each(networks, partial(add, images=normalize(batch.images_BCHW), labels_B=labels_B), failed)
    for image in unreadable:
        console.say_once(f"damaged held-out image left out: {image}")  # every evaluation meets the same
    all_sum(sums_N5)
    found = {key: sums[key].tolist() for key in networks if key not in (failed or {})}
    if not found:
        return {}
    rows, damaged = next(iter(found.values()))[3:]
    if damaged > damaged_allowed(max_damaged, int(rows + damaged)):
        raise DamagedDataError(
            f"{damaged:.0f} of {rows + damaged:.0f} held-out images cannot be decoded ({', '.join(unreadable[:3])}); "
            f"data.max_damaged allows {max_damaged:.2%}: mend the data, or raise --data.max-damaged"
        )
    if not rows:
        raise UserError(f"{name} gave no images to evaluate on, and {damaged:.0f} that cannot be decoded: {remedy}")
    return {
        key: Accuracy(100 * top1 / rows, 100 * top5 / rows, ce / rows, int(rows), int(damaged))
        for key, (top1, top5, ce, _, _) in found.items()
    }


def read_information(
    distillers: Mapping[K, StudentModule],
    teacher: Teacher,
    batches: Iterable[LaneBatch],
    normalize: Normalizer,
    rows: int,
    failed: dict[K, str] | None = None,
) -> dict[K, dict[str, float]]:
    """Mutual information of every term of each student on held-out images, in nats, over all pairs of each batch.

    Also, from at most GRADIENT_IMAGES of each rank's first batch, the norm of each term's weighted gradient on the
    student's parameters: what the terms pull with. Only these images have a graph. Each student's is {"<term>/nats",
    "<term>/ceiling", "<term>/grad_norm", "ce/grad_norm", ...}; training modes and gradients are left as they were.
    After ``rows`` rows per worker the teacher need not run. ``failed``: see :func:`each`; for one rank.
    """
    readings = {key: _Reading(distiller) for key, distiller in distillers.items()}
    read = 0
    with in_mode(False, *distillers.values()):
        for batch in batches:
            if len(batch) < 2:
                continue
            images = normalize(batch.images_BCHW)
            labels_B, ids_B = batch.labels_B.to(normalize.device), batch.ids_B.to(normalize.device)
            features = teacher.features(images)
            seen = (images, labels_B, ids_B, features)
            each(readings, lambda key, seen=seen: readings[key].add(*seen), failed)  # type: ignore[misc]
            read += len(batch)
            if read >= rows:
                break
    return {key: reading.finish(normalize.device) for key, reading in readings.items() if key not in (failed or {})}


def _part(features: Features, rows: slice) -> Features:
    """The features of some rows of a batch."""
    return features._replace(
        logits_BC=features.logits_BC[rows],
        vectors={tap: value[rows] for tap, value in features.vectors.items()},
        maps={tap: value[rows] for tap, value in features.maps.items()},
    )


class _Reading:
    """The information of one student in evaluation mode, being summed."""

    def __init__(self, distiller: StudentModule) -> None:
        self.distiller = distiller
        self.names = [term.name for term in distiller.loss.plan]
        queued = {
            term.name for term in distiller.loss.plan if distiller.loss.queue is not None and term.kind != "feature"
        }
        self.read = {
            name: ("nats", "ceiling", *(("lane_nats", "lane_ceiling") if name in queued else ())) for name in self.names
        }
        self.norms = ["ce", *(["kd"] if distiller.loss.config.resolved_kd_weight else []), *self.names]
        self.begun = False
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}

    def _add(self, key: str, value: Tensor, weight: float) -> None:
        zero = torch.zeros((), dtype=torch.float64)
        self.sums[key] = self.sums.get(key, zero) + value.double().cpu() * weight
        self.counts[key] = self.counts.get(key, 0.0) + weight

    def add(self, images_BCHW: Tensor, labels_B: Tensor, ids_B: Tensor, features: Features) -> None:
        """Read a batch."""
        if not self.begun:
            self.begun = True
            few = slice(GRADIENT_IMAGES)
            self._add_norms(images_BCHW[few], labels_B[few], ids_B[few], _part(features, few))
        with torch.no_grad():
            output, _ = self.distiller.output(images_BCHW, labels_B, ids_B, features, reading=True)
        for name in self.names:
            for key in self.read[name]:
                self._add(f"{name}/{key}", output.log[f"{name}/{key}"], len(labels_B))

    def _add_norms(self, images_BCHW: Tensor, labels_B: Tensor, ids_B: Tensor, features: Features) -> None:
        """Take the norms of the gradients. The graph over all locations lives here alone."""
        with torch.enable_grad():
            output, _ = self.distiller.output(images_BCHW, labels_B, ids_B, features, reading=True)
        parameters = [p for p in self.distiller.student.parameters() if p.requires_grad]
        for key in self.norms:
            grads = torch.autograd.grad(output.terms[key], parameters, retain_graph=True, allow_unused=True)
            squares = [g.double().square().sum() for g in grads if g is not None]
            self._add(f"{key}/grad_norm", torch.stack(squares).sum().sqrt(), 1.0)

    def finish(self, device: torch.device) -> dict[str, float]:
        """The means over all ranks."""
        # Every rank sums the same keys in the same order, also one that had no batch.
        keys = [f"{key}/grad_norm" for key in self.norms]
        keys += [f"{name}/{key}" for name in self.names for key in self.read[name]]
        zero = torch.zeros((), dtype=torch.float64)
        table = torch.stack([torch.stack([self.sums.get(key, zero), zero + self.counts.get(key, 0.0)]) for key in keys])
        table = all_sum(table.to(device)).cpu()
        return {key: float(total / count) for key, (total, count) in zip(keys, table, strict=True)}
