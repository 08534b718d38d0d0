"""The frozen teacher: its features, and what its accuracy on held-out images must be."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from mimkd_ray.config import TeacherConfig
from mimkd_ray.errors import UserError
from mimkd_ray.losses.features import Features
from mimkd_ray.models.weights_file import FOLDER, HUB, shown
from mimkd_ray.taps.tap_codecs import Coding
from mimkd_ray.taps.tapped_model import TappedModel, TapShape, to_map, to_vector


def canonical(
    logits_BC: Tensor,
    taps: Mapping[str, Tensor],
    shapes: Mapping[str, TapShape],
    vectors: Iterable[str],
    maps: Iterable[str],
) -> Features:
    """Raw tap tensors as the loss wants them: vectors (B, C) and maps (B, C, H, W)."""
    return Features(
        logits_BC,
        {name: to_vector(taps[name], shapes[name]) for name in vectors},
        {name: to_map(taps[name], shapes[name]) for name in maps},
    )


class Teacher:
    """A frozen network in inference mode that gives the features which the loss reads.

    It is not a module of the student's: it appears in no checkpoint, no optimiser and no gradient reduction.
    """

    def __init__(
        self,
        model: nn.Module,
        shapes: Mapping[str, TapShape],
        vectors: Iterable[str],
        maps: Iterable[str],
        autocast: torch.dtype | None,
        coding: Coding | None = None,
        images: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """``coding``: the codecs of the run, whose pooling and components the features go through. ``images`` makes
        its images of the student's, if they are others (teacher_input.py)."""
        self.vectors, self.maps = tuple(vectors), tuple(maps)
        self.shapes = dict(shapes)
        self.tapped = TappedModel(model, sorted({*self.vectors, *self.maps}))
        self.tapped.requires_grad_(False).eval()
        self.autocast = autocast
        self.coding = coding
        self.images = images

    @torch.no_grad()
    def features(self, images_BCHW: Tensor) -> Features:
        """Run the teacher on normalised images, the student's. no_grad and not inference_mode: critics keep these
        tensors for their own backward pass."""
        if self.images is not None:
            images_BCHW = self.images(images_BCHW)
        with torch.autocast(images_BCHW.device.type, self.autocast, enabled=self.autocast is not None):
            logits_BC, taps = self.tapped(images_BCHW)
        found = canonical(logits_BC, taps, self.shapes, self.vectors, self.maps)
        return found if self.coding is None else self.coding.apply(found)


def weights_digest(model: nn.Module) -> str:
    """sha256 over names, shapes and bytes of all parameters and buffers. About 1 s per GB.

    The same for a network that was loaded in float32 and moved to float64, another device or memory layout.
    """
    sha = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        tensor = value.float() if value.dtype == torch.float64 else value
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def refuse_random(config: TeacherConfig) -> None:
    """Raise UserError for a teacher of random weights that nobody asked for. A function may load its own."""
    brings_weights = ":" in config.name and not config.name.startswith((HUB, FOLDER))
    if config.weights == "random" and not (config.trains or brings_weights or config.allow_chance):
        raise UserError(
            f"teacher {config.name} has random weights, and nothing to teach: pass --teacher.weights published or a "
            "file, or --teacher.train true, which trains it first; --teacher.allow-chance true distils from it as it is"
        )


def chance_limit(classes: int, rows: int) -> float:
    """Return the top-1 in percent below which a network may be guessing among ``classes``: three standard deviations
    above chance, and on few images at most half way from chance to 100 %."""
    chance = 1 / classes
    return 100 * (chance + min(3 * math.sqrt(chance * (1 - chance) / max(rows, 1)), (1 - chance) / 2))


def check_accuracy(config: TeacherConfig, top1: float, rows: int, classes: int) -> None:
    """Compare the teacher's held-out top-1 (percent) with chance among ``classes``, and with what the recipe
    expects."""
    limit = chance_limit(classes, rows)
    if top1 < limit and not config.allow_chance:
        remedy = (
            "train it longer (--teacher.epochs, --teacher.lr)"
            if config.trains
            else "check weights, class order, data.mean/std and data.image_size (or teacher.mean/std and image_size)"
        )
        raise UserError(
            f"teacher {config.name} with weights {shown(config.weights)} reaches {top1:.2f} % top-1 on {rows:,} "
            f"held-out images of {classes} classes; chance is {100 / classes:.2f} %, and below {limit:.2f} % it cannot "
            f"be told from it: {remedy}, or pass --teacher.allow-chance true"
        )
    if config.expect_top1 and not config.finetune and top1 < config.expect_top1 - config.tolerance:
        raise UserError(
            f"teacher {config.name} with weights {shown(config.weights)} reaches {top1:.2f} % top-1 on {rows:,} "
            f"held-out images; {config.expect_top1:.2f} % was expected: check weights, class order, data.mean/std "
            "and data.image_size (or teacher.mean/std and image_size), or pass --teacher.expect-top1 0"
        )
