"""One pass of images through the networks of an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mimkd_ray.config import Config
from mimkd_ray.data.loading.batches import first_three
from mimkd_ray.data.loading.damaged_images import damaged_allowed
from mimkd_ray.data.loading.loader import eval_batches, to_device
from mimkd_ray.data.sources.source import Source, SubsetSource
from mimkd_ray.errors import DamagedDataError, UserError
from mimkd_ray.evaluation.networks import Network, normalizer
from mimkd_ray.train.distributed import Context, is_distributed
from mimkd_ray.train.held_out.accuracy import told_batches

logger = logging.getLogger(__name__)


@dataclass
class Collected:
    """Rows of a pass, on the CPU: of a network, logits (N, V) and its taps' vectors (N, C)."""

    ids_N: Tensor
    labels_N: Tensor
    logits: list[Tensor]
    taps: list[dict[str, Tensor]]
    damaged: tuple[str, ...] = ()


def few(source: Source, rows: int, labels: Sequence[int] | None = None) -> Source:
    """Return at most `rows` rows of a set, evenly spaced, of the classes `labels`; 0 rows or None: all."""
    kept = np.arange(source.num_rows)
    if labels is not None:
        kept = np.flatnonzero(np.isin(source.labels(), np.asarray(labels)))
    if rows and rows < len(kept):
        kept = kept[np.linspace(0, len(kept) - 1, rows).round().astype(np.int64)]
    return source if len(kept) == source.num_rows else SubsetSource(source, kept)


def collect(
    networks: Sequence[Network],
    source: Source,
    config: Config,
    context: Context,
    title: str = "",
    change: Callable[[Tensor], Tensor] | None = None,
) -> Collected:
    """Run `networks` on a set, over all ranks of a process group, which all get the whole. `change` is applied to the
    uint8 images first. Damaged images are named and left out; raises DamagedDataError if there are more of them than
    `data.max_damaged` allows, and UserError if no image is left."""
    normalize = normalizer(config, context.device)
    batches = eval_batches(
        source, config.data, config.train.eval_batch or config.train.lane_batch, context.rank, context.world_size
    )
    own: list[tuple[Tensor, Tensor, list[Tensor], list[dict[str, Tensor]]]] = []
    own_damaged: list[str] = []
    if title:
        batches = told_batches(batches, source, context.world_size, title, said=True)
    for batch in to_device(batches, context.device):
        own_damaged += batch.damaged
        if not len(batch):
            continue
        images = normalize(batch.images_BCHW if change is None else change(batch.images_BCHW))
        answers = [network(images) for network in networks]
        logits = [logits_BV.cpu() for logits_BV, _ in answers]
        taps = [{name: vector.cpu() for name, vector in vectors.items()} for _, vectors in answers]
        own.append((batch.ids_B.cpu().clone(), batch.labels_B.cpu().clone(), logits, taps))
    for image in own_damaged if title else ():  # later passes meet the same
        logger.warning("damaged image left out: %s", image)
    everyone = [(own, own_damaged)] * context.world_size
    if is_distributed():
        dist.all_gather_object(everyone, (own, own_damaged))
    rows = [row for each, _ in everyone for row in each]
    damaged = [image for _, each in everyone for image in each]
    if len(damaged) > damaged_allowed(config.data.max_damaged, source.num_rows):
        raise DamagedDataError(
            f"{len(damaged)} of {source.num_rows} images cannot be decoded ({first_three(damaged)}); "
            f"data.max_damaged allows {config.data.max_damaged:.2%}: mend the data, or raise --data.max-damaged"
        )
    if not rows:
        raise UserError(f"{source.num_rows} images, and none can be evaluated: {', '.join(damaged[:3])}")
    ids, labels, all_logits, all_taps = zip(*rows, strict=True)
    return Collected(
        torch.cat(ids),
        torch.cat(labels),
        [torch.cat(each) for each in zip(*all_logits, strict=True)],
        [{name: torch.cat([row[name] for row in each]) for name in each[0]} for each in zip(*all_taps, strict=True)],
        tuple(damaged),
    )
