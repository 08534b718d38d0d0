"""The named augmentation pipelines, and pipelines by import path."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimkd_ray.config.form.pipeline_name import check_pipeline_name, pipeline_function
from mimkd_ray.data.augment.batch_views import BatchTransform, CropFlip
from mimkd_ray.data.augment.transforms import CentreCrop, FitSize, OnPillow, ResizedCropFlip, Then, Transform
from mimkd_ray.errors import UserError
from mimkd_ray.user_functions import call_named


class Pipeline(NamedTuple):
    """The transforms of one image in training and in evaluation, and the transform of whole training batches.

    `eval` draws no random numbers. `batch` is applied after `train`, on the batch's device.
    """

    train: Transform
    eval: Transform
    batch: BatchTransform | None = None


def make_pipeline(name: str, image_size: int) -> Pipeline:
    """Build a pipeline of uint8 images, `image_size` squared: one of PIPELINES, or "package.module:function".

    The function gets `image_size` and returns a transform (evaluation is then ImageNet's centre crop) or a pair for
    training and evaluation. Transforms take and return uint8 (3, H, W), as torchvision v2's do. They may draw from
    torch's, Python's and NumPy's global generators. Raises UserError.
    """
    check_pipeline_name(name)
    if ":" in name:
        return _imported(name, image_size)
    return PIPELINES[name](image_size)


def _imagenet(size: int, augment: str = "") -> Pipeline:
    crop = ResizedCropFlip(size)
    return Pipeline(Then(crop, _augment(augment)) if augment else crop, CentreCrop(size))


def _cifar(size: int, augment: str = "") -> Pipeline:
    fit = FitSize(size)
    return Pipeline(Then(fit, _augment(augment)) if augment else fit, fit, CropFlip(padding=4, flip=True))


def _augment(name: str) -> Transform:
    from torchvision.transforms import v2  # imported here because the import takes longer than a short run's decoding

    return OnPillow(getattr(v2, name)())


def _digits(size: int) -> Pipeline:
    return Pipeline(FitSize(size), FitSize(size), CropFlip(padding=1, flip=False))


def _none(size: int) -> Pipeline:
    return Pipeline(FitSize(size), FitSize(size))


PIPELINES: dict[str, Callable[[int], Pipeline]] = {
    "imagenet": _imagenet,
    "imagenet_ta": partial(_imagenet, augment="TrivialAugmentWide"),
    "imagenet_ra": partial(_imagenet, augment="RandAugment"),
    "cifar": _cifar,
    "cifar_ta": partial(_cifar, augment="TrivialAugmentWide"),
    "digits": _digits,
    "none": _none,
}
"""Pipelines by name. TrivialAugment and RandAugment have torchvision's defaults and are applied to the image at its
final size; `cifar_ta` applies them before crop and flip, which are computed for the whole batch."""


def _imported(name: str, size: int) -> Pipeline:
    made = call_named("pipeline", name, pipeline_function(name), size)
    pair = made if isinstance(made, tuple) else (made, CentreCrop(size))
    if len(pair) != 2 or not all(map(callable, pair)):
        kinds = ", ".join(type(part).__name__ for part in pair)
        raise UserError(
            f"pipeline '{name}' returned ({kinds}); it must return a transform, or a pair of transforms for training "
            "and evaluation"
        )
    return Pipeline(_Checked(_Reseeded(pair[0]), name, size), _Checked(pair[1], name, size))


@dataclass(frozen=True)
class _Reseeded:
    """A transform with Python's and NumPy's generators seeded like torch's, and restored afterwards: 60 us.

    torchvision v2 draws from torch's generator alone (all of its transforms, version 0.29); a user's function may not.
    """

    transform: Transform

    def __call__(self, image: Tensor) -> Tensor:
        seed = torch.initial_seed() % 2**32  # the seed that `View` gave torch's generator
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # others' global generator
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            return self.transform(image)
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@dataclass(frozen=True)
class _Checked:
    """A transform that raises UserError for a result that cannot be put into a batch."""

    transform: Transform
    name: str
    size: int

    def __call__(self, image: Tensor) -> Tensor:
        result = self.transform(image)
        if not isinstance(result, Tensor):
            raise UserError(f"pipeline '{self.name}' gave {type(result).__name__}; it must give a uint8 tensor")
        shape = (3, self.size, self.size)
        if result.dtype != torch.uint8 or result.shape != shape:
            raise UserError(
                f"pipeline '{self.name}' gave {result.dtype} {tuple(result.shape)} for an image of "
                f"{tuple(image.shape)}; it must give torch.uint8 {shape}: leave casts and normalisation out (they are "
                "done on the device) and end with the size"
            )
        return result
