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


def mix(images_BCHW: Tensor, labels_B: Tensor, num_classes: int, what: Mix | None) -> tuple[Tensor, Tensor]:
    """Return the mixed floating-point images and the labels_BC, float32, whose rows sum to 1.

    Image b is mixed with image b - 1 (the first with the last), as in torchvision v2's MixUp and CutMix. Batches that
    are not mixed return the images unchanged. Runs on any device without waiting for it; makes one copy of the images:
    26 ms for 64 float32 images of 224 x 224 on one core with mixup (torchvision 47 ms), 6 ms with CutMix.
    """
    labels_BC = torch.nn.functional.one_hot(labels_B, num_classes).float()
    if what is None:
        return images_BCHW, labels_BC
    labels_BC = labels_BC.roll(1, 0).mul_(1 - what.own).add_(labels_BC, alpha=what.own)
    if what.box is None:
        return images_BCHW.roll(1, 0).mul_(1 - what.own).add_(images_BCHW, alpha=what.own), labels_BC
    left, top, right, bottom = what.box
    mixed_BCHW = images_BCHW.clone()
    mixed_BCHW[:, :, top:bottom, left:right] = images_BCHW[:, :, top:bottom, left:right].roll(1, 0)
    return mixed_BCHW, labels_BC


def mix_numbers(what: Mix | None) -> Tensor:
    """Return a mix as :func:`mix_by_numbers` reads it, on the host: an image's share of its label, its share of the
    pixels outside of the box, and the box. A batch that is not mixed has the shares 1 and an empty box."""
    own, box = what or Mix(1.0, None)
    return torch.tensor([own, own if box is None else 1.0, *(box or (0, 0, 0, 0))], dtype=torch.float64)


def mix_by_numbers(images_BCHW: Tensor, labels_B: Tensor, num_classes: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`mix` for a CUDA graph, which reads the ``numbers`` of :func:`mix_numbers` from the images' device. Equal
    to it, with mixup up to rounding; every batch costs three passes over its images."""
    device, (height, width) = images_BCHW.device, images_BCHW.shape[2:]
    own, outside, left, top, right, bottom = numbers.unbind()
    rows_H1, columns_W = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    in_box_HW = (rows_H1 >= top) & (rows_H1 < bottom) & (columns_W >= left) & (columns_W < right)
    labels_BC = (labels_B[:, None] == torch.arange(num_classes, device=device)).float()
    mixed_BCHW = torch.where(in_box_HW, images_BCHW.roll(1, 0), _mixed(images_BCHW, outside))
    return mixed_BCHW, _mixed(labels_BC, own)


def _mixed(value: Tensor, share: Tensor) -> Tensor:
    own, other = share.to(value.dtype), (1 - share).to(value.dtype)
    return value.roll(1, 0).mul_(other).addcmul_(value, own)
