"""The real images of an export: held-out ones for comparisons, training ones for calibration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mimkd_ray.config import DataConfig
from mimkd_ray.data.loading.loader import eval_batches
from mimkd_ray.data.sources.source import Source, SubsetSource
from mimkd_ray.errors import UserError
from mimkd_ray.export.deployed import Deployed

BATCH = 32
BLOCKS = 32
"""Blocks that images of a stored set are taken from: a block is read as a whole."""


@dataclass(frozen=True, eq=False)
class Images:
    """Images as evaluation has them, uint8, with their labels; in memory."""

    pixels_NCHW: Tensor
    labels_N: Tensor

    def batches(self, network: Deployed) -> Iterator[Tensor]:
        """Yield the images as the network takes them, at most BATCH at a time."""
        return (network.inputs(pixels) for pixels in self.pixels_NCHW.split(BATCH))


def read_images(source: Source, data: DataConfig, count: int, name: str) -> Images:
    """Return ``count`` images from all over the set (0, or more than there are: all). Raises UserError for none."""
    chosen = SubsetSource(source, spread(source, count))
    read = [batch for batch in eval_batches(chosen, replace(data, read_ahead=0), BATCH) if len(batch)]
    if not read:
        raise UserError(f"{name} gave no image that can be decoded, of {chosen.num_rows:,}: name another set")
    return Images(torch.cat([batch.images_BCHW for batch in read]), torch.cat([batch.labels_B for batch in read]))


def spread(source: Source, count: int) -> np.ndarray:
    """Return sorted positions of ``count`` rows, evenly over the set; of a stored one, over a few whole blocks."""
    rows = np.arange(source.num_rows)
    if not 0 < count < len(rows):
        return rows
    blocks = source.blocks
    if source.block_bytes and blocks.num_blocks > BLOCKS:
        some = _evenly(np.arange(blocks.num_blocks), max(BLOCKS, -(-count // max(1, int(blocks.counts.min())))))
        rows = np.concatenate([np.arange(blocks.start(int(b)), blocks.start(int(b) + 1)) for b in some])
    return _evenly(rows, count)


def _evenly(values: np.ndarray, count: int) -> np.ndarray:
    """Return ``count`` of the values, evenly spaced."""
    return values[np.arange(min(count, len(values))) * len(values) // min(count, len(values))]
