"""Exact distributed evaluation: every held-out row counts once, whatever the number of workers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mimkd_ray.data.loader import LaneBatch
from mimkd_ray.errors import DamagedDataError
from mimkd_ray.train.context import all_sum
from mimkd_ray.train.step import Distiller, Normalizer
from mimkd_ray.train.teacher import Teacher

logger = logging.getLogger(__name__)

READ_ROWS = 2048
"""Held-out rows per worker on which mutual information is read; beyond them the teacher need not run."""


class Accuracy(NamedTuple):
    """Held-out figures. top-1 and top-5 in percent; top-5 is 100 for 5 classes and fewer."""

    top1: float
    top5: float
    cross_entropy: float
    rows: int
    damaged: int


@torch.no_grad()
def accuracy(
    logits_of: Callable[[Tensor], Tensor],
    batches: Iterable[LaneBatch],
    normalize: Normalizer,
    max_damaged: float = 0.0,
) -> Accuracy:
    """Top-1, top-5 and cross-entropy over the batches of all ranks. Damaged images are left out and counted.

    Raises DamagedDataError if their share exceeds ``max_damaged``, on all ranks alike.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=normalize.device)
    names: list[str] = []
    for batch in batches:
        names += batch.damaged
        sums[4] += len(batch.damaged)
        if len(batch):
            labels_B = batch.labels_B.to(normalize.device, non_blocking=True)
            logits_BC = logits_of(normalize(batch.images_BCHW)).float()
            best_BK = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices
            hit_BK = best_BK == labels_B.unsqueeze(1)
            sums[0] += hit_BK[:, 0].sum()
            sums[1] += hit_BK.sum()
            sums[2] += F.cross_entropy(logits_BC, labels_B, reduction="sum")
            sums[3] += len(batch)
    for name in names:
        logger.warning("damaged held-out image left out: %s", name)
    top1, top5, ce, rows, damaged = all_sum(sums).tolist()
    if damaged > max_damaged * (rows + damaged):
        raise DamagedDataError(
            f"{damaged:.0f} of {rows + damaged:.0f} held-out images cannot be decoded ({', '.join(names[:3])}); "
            f"data.max_damaged allows {max_damaged:.2%}: mend the data, or raise --data.max-damaged"
        )
    return Accuracy(100 * top1 / rows, 100 * top5 / rows, ce / rows, int(rows), int(damaged))


def read_information(
    distiller: Distiller, teacher: Teacher, batches: Iterable[LaneBatch], normalize: Normalizer
) -> dict[str, float]:
    """Mutual information of every term on held-out images, in nats, over all pairs of each batch.

    Also, from each rank's first batch, the norm of each term's weighted gradient on the student's parameters: what
    the terms pull with. Returns {"<term>/nats", "<term>/ceiling", "<term>/grad_norm", "ce/grad_norm", ...}; training
    mode and gradients are left as they were.
    """
    training = distiller.training
    distiller.eval()
    sums: dict[str, Tensor] = {}
    counts: dict[str, float] = {}

    def add(key: str, value: Tensor, weight: float) -> None:
        sums[key] = sums.get(key, torch.zeros((), dtype=torch.float64)) + value.double().cpu() * weight
        counts[key] = counts.get(key, 0.0) + weight

    names = [term.name for term in distiller.loss.plan]
    norms = ["ce", *(["kd"] if distiller.loss.config.kd_weight else []), *names]
    read = 0
    for batch in batches:
        if len(batch) < 2:
            continue
        images = normalize(batch.images_BCHW)
        labels_B, ids_B = batch.labels_B.to(normalize.device), batch.ids_B.to(normalize.device)
        features = teacher.features(images)
        with torch.set_grad_enabled(read == 0):
            output, _ = distiller.output(images, labels_B, ids_B, features, reading=True)
        if read == 0:
            parameters = [p for p in distiller.student.parameters() if p.requires_grad]
            for key in norms:
                grads = torch.autograd.grad(output.terms[key], parameters, retain_graph=True, allow_unused=True)
                squares = [g.double().square().sum() for g in grads if g is not None]
                add(f"{key}/grad_norm", torch.stack(squares).sum().sqrt(), 1.0)
        for name in names:
            for key in ("nats", "ceiling"):
                add(f"{name}/{key}", output.log[f"{name}/{key}"], len(batch))
        read += len(batch)
        if read >= READ_ROWS:
            break
    distiller.train(training)
    # Every rank sums the same keys in the same order, also one that had no batch.
    keys = [f"{key}/grad_norm" for key in norms] + [f"{name}/{key}" for name in names for key in ("nats", "ceiling")]
    zero = torch.zeros((), dtype=torch.float64)
    table = torch.stack([torch.stack([sums.get(key, zero), zero + counts.get(key, 0.0)]) for key in keys])
    table = all_sum(table.to(normalize.device)).cpu()
    return {key: float(total / count) for key, (total, count) in zip(keys, table, strict=True)}
