"""One pass of images through the networks of an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mimkd_ray.config import Config
from mimkd_ray.data.loading.batches import first_three
from mimkd_ray.data.loading.damage import damaged_allowed
from mimkd_ray.data.loading.loader import eval_batches, to_device
from mimkd_ray.data.sources.source import Source, SubsetSource
from mimkd_ray.errors import DamagedDataError, UserError
from mimkd_ray.evaluation.networks import Network, normalizer
from mimkd_ray.train.distributed import Context, is_distributed
from mimkd_ray.train.held_out.evaluate import told_batches

logger = logging.getLogger(__name__)


@dataclass
class Collected:
    """Rows of a pass, on the CPU: of a network, logits (N, V) and its taps' vectors (N, C)."""

    ids_N: Tensor
    labels_N: Tensor
    logits: list[Tensor]
    taps: list[dict[str, Tensor]]
    damaged: tuple[str, ...] = ()


@dataclass
class _Parts:
    ids: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    logits: list[list[Tensor]] = field(default_factory=list)
    taps: list[list[dict[str, Tensor]]] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


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
    parts = _Parts(logits=[[] for _ in networks], taps=[[] for _ in networks])
    if title:
        batches = told_batches(batches, source, context.world_size, title, said=True)
    for batch in to_device(batches, context.device):
        parts.damaged += batch.damaged
        if not len(batch):
            continue
        images = batch.images_BCHW if change is None else change(batch.images_BCHW)
        images = normalize(images)
        for number, network in enumerate(networks):
            logits_BV, vectors = network(images)
            parts.logits[number].append(logits_BV.cpu())
            parts.taps[number].append({name: vector.cpu() for name, vector in vectors.items()})
        parts.ids.append(batch.ids_B.cpu().clone())
        parts.labels.append(batch.labels_B.cpu().clone())
    whole = _gathered(parts)
    for image in parts.damaged if title else ():  # later passes meet the same
        logger.warning("damaged image left out: %s", image)
    if len(whole.damaged) > damaged_allowed(config.data.max_damaged, source.num_rows):
        raise DamagedDataError(
            f"{len(whole.damaged)} of {source.num_rows} images cannot be decoded ({first_three(whole.damaged)}); "
            f"data.max_damaged allows {config.data.max_damaged:.2%}: mend the data, or raise --data.max-damaged"
        )
    if not whole.ids:
        raise UserError(f"{source.num_rows} images, and none can be evaluated: {', '.join(whole.damaged[:3])}")
    return Collected(
        torch.cat(whole.ids),
        torch.cat(whole.labels),
        [torch.cat(rows) for rows in whole.logits],
        [{name: torch.cat([row[name] for row in rows]) for name in rows[0]} for rows in whole.taps],
        tuple(whole.damaged),
    )


def _gathered(parts: _Parts) -> _Parts:
    """The parts of all ranks, in their order."""
    if not is_distributed():
        return parts
    everyone: list[_Parts] = [_Parts()] * dist.get_world_size()
    dist.all_gather_object(everyone, parts)
    whole = _Parts(logits=[[] for _ in parts.logits], taps=[[] for _ in parts.taps])
    for each in everyone:
        whole.ids += each.ids
        whole.labels += each.labels
        whole.damaged += each.damaged
        for number in range(len(parts.logits)):
            whole.logits[number] += each.logits[number]
            whole.taps[number] += each.taps[number]
    return whole
