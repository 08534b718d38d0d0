"""What a dry run tells about a network before anything starts: whether it can be built, and what its logits are."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from mimkd_ray.errors import UserError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.models.outputs import describe
from mimkd_ray.taps.dry_run import SMALL, dry_run

FEW_WEIGHTS = 30_000_000
"""Weights up to which a network is built for real where images are small."""


def build_without_weights(name: str, num_classes: int, image_size: int | None, side: int | None = None) -> nn.Module:
    """The network on the meta device, which takes no time and no memory; for real where that cannot be, or costs less.

    It cannot where the constructor or the forward pass reads a value (`.item()`, `.tolist()`), as RegNet's constructor
    does, drop-path rates of Swin or DINOv2 in other people's files, and masks. It costs less for a small network on
    small images: 0.03 s for ResNet-8 and 0.5 s for ResNet-50, where the first batch norm on the meta device loads
    torch's compiler (2.3 s on the same two slow cores). `side`: pixels of the dry run if not `image_size`. torch's
    random state is left as it was. Raises UserError for what cannot be built at all.
    """
    size = side or image_size
    with torch.random.fork_rng(devices=[]):
        with contextlib.suppress(Exception):  # foreign code; whatever it is, building for real says what is wrong
            with torch.device("meta"):
                model = build_model(name, num_classes, image_size=image_size)
            weights = sum(parameter.numel() for parameter in model.parameters())
            if size is None:
                return model
            if size > SMALL or weights > FEW_WEIGHTS:
                dry_run(model, size)
                return model
        return build_model(name, num_classes, image_size=image_size)


def check_logits(model: nn.Module, image_size: int, num_classes: int | None = None, trained: bool = False) -> int:
    """Return the number of logits. Raises UserError unless the network returns logits (B, num_classes), or (B, any
    number) for None.

    `trained`: also in training mode, where auxiliary classifiers come in, and with parameters to train. What a network
    cannot do there without data (synchronised batch norms, targets) is left to the training to tell.
    """
    logits = dry_run(model, image_size).logits
    _check(logits, model, num_classes, "")
    if trained:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError(
                f"{describe(model)} has no parameter that requires a gradient: nothing of it can be trained"
            )
        try:
            run = dry_run(model, image_size, training=True)
        except UserError:
            return logits.shape[1]
        _check(run.logits, model, num_classes, " in training mode")
    return logits.shape[1]


def _check(logits: Tensor, model: nn.Module, num_classes: int | None, when: str) -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise UserError(
            f"{describe(model)} returns a tensor of shape {tuple(logits.shape)} and {logits.dtype} for 2 images{when}, "
            "not logits (2, classes): end it with a classifier"
        )
    if num_classes is not None and logits.shape[1] != num_classes:
        raise UserError(
            f"{describe(model)} gives {logits.shape[1]} logits{when}, and the data has {num_classes} classes: its "
            f"function was called with num_classes={num_classes}, and must make the last layer of that size"
        )
