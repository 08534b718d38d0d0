"""mixup and CutMix of a batch, replayable: the mix is a pure function of (seed, step, lane).

Each image is mixed with its neighbour in the batch, and so are the labels. Mixing cannot be combined with cached
teacher features, because the features of a mixed image are not a mix of features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimkd_ray.config import MixConfig
from mimkd_ray.data.order import random_numbers


class Mix(NamedTuple):
    """The mix of one batch. `own` is each image's share of its own mix; `box` the replaced part, or None."""

    own: float
    box: tuple[int, int, int, int] | None  # left, top, right, bottom, in pixels; None for mixup


def draw_mix(config: MixConfig, seed: int, step: int, lane: int, height: int, width: int) -> Mix | None:
    """Draw the mix of this batch of images (height, width); None if it is not mixed. Runs on the host only, 35 us."""
    if not config.active:
        return None
    key = random_numbers.raw(2, seed, "batch mixing", step, lane)
    draw = np.random.RandomState(
        np.random.Philox(key=key)
    )  # NumPy has frozen its distributions, Generator's it may change
    mixed, switched = draw.random_sample(2)
    if mixed >= config.probability:
        return None
    if config.cutmix_alpha == 0 or (config.mixup_alpha > 0 and switched >= config.switch_probability):
        return Mix(draw.beta(config.mixup_alpha, config.mixup_alpha), None)
    other = 1 - draw.beta(config.cutmix_alpha, config.cutmix_alpha)
    x, y = (int(place * side) for place, side in zip(draw.random_sample(2), (width, height), strict=True))
    half_width, half_height = (int(0.5 * math.sqrt(other) * side) for side in (width, height))
    left, right = max(x - half_width, 0), min(x + half_width, width)
    top, bottom = max(y - half_height, 0), min(y + half_height, height)
    return Mix(1 - (right - left) * (bottom - top) / (width * height), (left, top, right, bottom))


def mix_numbers(config: MixConfig, seed: int, step: int, lane: int, height: int, width: int) -> Tensor:
    """Return the mix of a batch as :func:`mix` reads it, on the host: an image's share of its label, its share of the
    pixels outside of the box, and the box. A batch that is not mixed has the shares 1 and an empty box."""
    what = draw_mix(config, seed, step, lane, height, width)
    if what is None:
        what = Mix(1.0, None)
    outside, box = (what.own, (0, 0, 0, 0)) if what.box is None else (1.0, what.box)
    return torch.tensor([what.own, outside, *box], dtype=torch.float64)


def mix(images_BCHW: Tensor, labels_B: Tensor, num_classes: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mixed floating-point images and the labels_BC, float32, whose rows sum to 1. ``numbers`` are those of
    :func:`mix_numbers`, on the images' device: nothing waits for it, and a CUDA graph may read them.

    Image b is mixed with image b - 1 (the first with the last), as in torchvision v2's MixUp and CutMix. Images that
    are not mixed keep their values. Makes two copies of the images.
    """
    device, (height, width) = images_BCHW.device, images_BCHW.shape[2:]
    own, outside, left, top, right, bottom = numbers.unbind()
    rows_H1, columns_W = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    in_box_HW = (rows_H1 >= top) & (rows_H1 < bottom) & (columns_W >= left) & (columns_W < right)
    labels_BC = (labels_B[:, None] == torch.arange(num_classes, device=device)).float()
    return _mixed(images_BCHW, torch.where(in_box_HW, 0.0, outside)), _mixed(labels_BC, own)


def _mixed(value: Tensor, share: Tensor) -> Tensor:
    own, other = share.to(value.dtype), (1 - share).to(value.dtype)
    return (value * own).addcmul_(value.roll(1, 0), other)
