"""The student's features judged by k nearest neighbours, which need labels of some images and no head."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimkd_ray.config import Config
from mimkd_ray.data.loading.batches import LaneBatch
from mimkd_ray.data.loading.loader import eval_batches
from mimkd_ray.data.sources.data_set import Data
from mimkd_ray.data.sources.source import Source, SubsetSource
from mimkd_ray.models.train_or_eval import in_mode
from mimkd_ray.taps.tapped_model import TappedModel, TapShape, to_vector
from mimkd_ray.train.networks.student_module import Normalizer

NEIGHBOURS = 20
TEMPERATURE = 0.07
"""As in the k-NN evaluation of DINO (arXiv 2104.14294): votes are weighted by exp(cosine / TEMPERATURE)."""
BANK_ROWS = 20_000
"""Labelled training images, evenly over the set, of which the neighbours are taken."""
SCORES = 1_000_000
"""Cosines that are held at a time."""


def knn_top1(model: nn.Module, vector: TapShape, config: Config, data: Data, normalize: Normalizer) -> float | None:
    """Top-1 in percent of the held-out images by their nearest labelled training images, in the space of ``vector``, a
    layer of ``model``; of a set without labelled training images, or that is held out itself, by the other held-out
    ones. None where nothing held out has a label.

    Costs a forward pass of at most BANK_ROWS training images and of the held-out ones, in evaluation mode. Every worker
    does all of it.
    """
    if not data.judged:
        return None
    bank = _bank(config, data)
    tapped = TappedModel(model, [vector.name])
    try:
        with in_mode(False, model):
            held_out = _features(tapped, vector, _batches(config, data.val), normalize)
            others = _features(tapped, vector, _batches(config, bank), normalize) if bank is not None else held_out
    finally:
        tapped.release()
    return knn_accuracy(*others, *held_out, leave_one_out=bank is None)


def knn_accuracy(
    bank_NC: Tensor, labels_N: Tensor, queries_QC: Tensor, labels_Q: Tensor, leave_one_out: bool = False
) -> float:
    """Top-1 in percent of a weighted vote of the NEIGHBOURS nearest by cosine. ``leave_one_out``: bank and queries are
    the same rows, none of which is its own neighbour."""
    bank_NC, queries_QC = F.normalize(bank_NC.float(), dim=1), F.normalize(queries_QC.float(), dim=1)
    count = min(NEIGHBOURS, len(bank_NC) - leave_one_out)
    classes = int(max(labels_N.max(), labels_Q.max())) + 1
    rows = max(1, SCORES // len(bank_NC))
    hits = 0
    for start in range(0, len(queries_QC), rows):
        cosines_qN = queries_QC[start : start + rows] @ bank_NC.T
        if leave_one_out:
            own = torch.arange(len(cosines_qN))
            cosines_qN[own, own + start] = -torch.inf
        near_qk, places_qk = cosines_qN.topk(count, dim=1)
        votes_qC = torch.zeros(len(cosines_qN), classes, device=cosines_qN.device)
        votes_qC.scatter_add_(1, labels_N[places_qk], ((near_qk - 1) / TEMPERATURE).exp())
        hits += int((votes_qC.argmax(1) == labels_Q[start : start + rows]).sum())
    return 100 * hits / len(queries_QC)


def _bank(config: Config, data: Data) -> Source | None:
    if not config.data.holdout and config.data.val_split == config.data.train_split:
        return None
    known = np.flatnonzero(data.train.labels() >= 0)
    if not len(known):
        return None
    step = -(-len(known) // BANK_ROWS)
    return SubsetSource(data.train, known[::step])


def _batches(config: Config, source: Source) -> Iterable[LaneBatch]:
    return eval_batches(source, config.data, config.train.eval_batch or config.train.lane_batch)


@torch.no_grad()
def _features(
    tapped: TappedModel, vector: TapShape, batches: Iterable[LaneBatch], normalize: Normalizer
) -> tuple[Tensor, Tensor]:
    found, labels = [], []
    for batch in batches:
        if len(batch):
            _, taps = tapped(normalize(batch.images_BCHW))
            found.append(to_vector(taps[vector.name], vector).float().cpu())
            labels.append(batch.labels_B)
    return torch.cat(found), torch.cat(labels)
