"""The images that a network's publishers made its weights for: size, mean and deviation, interpolation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mimkd_ray.config.teacher import Interpolation
from mimkd_ray.models.published import of_timm, own_network
from mimkd_ray.models.weights_file import FOLDER, HUB

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class NetworkInput:
    """What images a network takes."""

    size: int
    """Height and width."""
    mean: Channels
    std: Channels
    interpolation: Interpolation
    """By which images of another size are resized."""


def published_input(name: str) -> NetworkInput | None:
    """What a network's publishers say: timm's `pretrained_cfg`, the transforms of torchvision's default weights. None
    for networks that have nothing of the kind. Raises UserError for unknown names."""
    if name.startswith((HUB, FOLDER)):
        own, settings = own_network(name)
        if own:
            return _of_timm(settings)
    if name.startswith(("timm/", HUB, FOLDER)):
        return _of_timm(of_timm(name).settings)
    if ":" in name or "/" in name:
        return None
    return _of_torchvision(name)


def _of_timm(config: Mapping[str, Any]) -> NetworkInput | None:
    size, mean, std = (config.get(key) for key in ("input_size", "mean", "std"))
    if not size or not mean or not std:
        return None
    return NetworkInput(int(size[-1]), three(mean), three(std), _known(str(config.get("interpolation"))))


def _of_torchvision(name: str) -> NetworkInput | None:
    from torchvision import models

    if name not in models.list_models(module=models):
        return None  # building the network says so
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    return NetworkInput(
        transforms.crop_size[0],
        three(transforms.mean),
        three(transforms.std),
        _known(transforms.interpolation.value),
    )


def three(values: Sequence[float]) -> Channels:
    """The values of the three colour channels."""
    red, green, blue = values
    return float(red), float(green), float(blue)


def _known(interpolation: str) -> Interpolation:
    """The interpolation, or bicubic for those that tensors have none of (lanczos, random)."""
    return "bilinear" if interpolation == "bilinear" else "bicubic"
