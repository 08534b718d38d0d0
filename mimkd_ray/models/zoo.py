"""Networks by name: torchvision's and timm's classifiers, the CIFAR networks, functions by import path."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from mimkd_ray.errors import UserError, nearest
from mimkd_ray.models.weights import class_mismatch, load_weights

_AUX = ("aux1.", "aux2.", "AuxLogits.")
_WITH_AUX = ("googlenet", "inception_v3")


def model_names() -> list[str]:
    """Return the names that `build_model` knows, sorted: torchvision's classifiers and cifar/NAME (without timm's)."""
    from mimkd_ray.models.cifar_registry import NETWORKS

    return sorted([*_torchvision_names(), *(f"cifar/{name}" for name in NETWORKS)])


def build_model(name: str, num_classes: int, weights: str = "random", image_size: int | None = None) -> nn.Module:
    """Build a network that maps images (B, 3, H, W) to logits (B, num_classes) in training and in evaluation.

    `weights`: "random", "published" (torchvision's default, timm's pretrained; downloaded) or a file, see
    `load_weights`. `image_size` (pixels) is passed to networks that are made for one size (ViT, MaxViT, timm's fixed
    ones); others ignore it. GoogLeNet and Inception have no auxiliary classifiers, and take images normalised by
    ImageNet's mean and standard deviation, whatever their weights. Raises UserError for unknown names, for weights that
    cannot be loaded or do not fit, and for functions that return no network.
    """
    if num_classes < 1:
        raise UserError(f"model {name!r}: {num_classes} classes, expected at least 1")
    published = weights == "published"
    if ":" in name:
        model = _from_function(name, num_classes, published)
    elif name.startswith("cifar/"):
        model = _from_cifar(name, num_classes, published)
    elif name.startswith("timm/"):
        model = _from_timm(name, num_classes, published, image_size)
    else:
        model = _from_torchvision(name, num_classes, published, image_size)
    if weights not in ("random", "published"):
        load_weights(model, weights, num_classes, ignore=_AUX if name in _WITH_AUX else ())
    # Used by messages to name the network as the user did; not part of its state.
    vars(model)["zoo_name"] = name
    return model


def _unknown(name: str) -> UserError:
    kinds = "a torchvision classifier, cifar/NAME, timm/NAME or package.module:function"
    return UserError(f"unknown model {name!r} (expected {kinds}){nearest(name, model_names())}")


def _download(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """Build with downloaded weights; any failure is a UserError with the remedy."""
    try:
        return make()
    except Exception as error:  # each hub's client has its own exceptions; the cause is in the message
        raise UserError(
            f"published weights of {name} could not be downloaded: {error}; "
            f"download the file elsewhere and pass its path as weights"
        ) from error


def _torchvision_names() -> list[str]:
    from torchvision import models

    return models.list_models(module=models)


def _from_torchvision(name: str, num_classes: int, published: bool, image_size: int | None) -> nn.Module:
    from torchvision import models

    if name not in _torchvision_names():
        raise _unknown(name)
    options: dict[str, Any] = {}
    if name in _WITH_AUX:
        # Always the same input convention, so that a trained network can be saved and loaded like any other.
        options["transform_input"] = True
        if not published:
            # Their own initialisation is slow, and batch norm makes it unnecessary.
            options |= {"aux_logits": False, "init_weights": False}
    if image_size is not None and name.startswith("vit_"):
        options["image_size"] = image_size
    if image_size is not None and name.startswith("maxvit"):
        options["input_size"] = (image_size, image_size)
    if not published:
        return _sized(name, image_size, lambda: models.get_model(name, num_classes=num_classes, **options))
    meta = models.get_model_weights(name).DEFAULT.meta
    classes = len(meta["categories"])
    if classes != num_classes:
        raise UserError(class_mismatch(f"published for {name}", classes, num_classes))
    fixed = meta["min_size"][0]
    if "image_size" in options and image_size != fixed:
        raise UserError(
            f"published weights of {name} are for images of {fixed} pixels, not {image_size}: resize to {fixed}"
        )
    model = _download(name, lambda: models.get_model(name, weights="DEFAULT", progress=False, **options))
    if name in _WITH_AUX:
        vars(model)["aux_logits"] = False
        for head in ("aux1", "aux2") if name == "googlenet" else ("AuxLogits",):
            setattr(model, head, None)
    return model


def _sized(name: str, image_size: int | None, make: Callable[[], nn.Module]) -> nn.Module:
    """Build a network of a fixed image size, whose patches or windows may not divide `image_size`: then raise
    UserError."""
    if image_size is None:
        return make()
    try:
        return make()
    except (ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name} cannot be built for images of {image_size} pixels: {reason}") from error


def _from_cifar(name: str, num_classes: int, published: bool) -> nn.Module:
    from mimkd_ray.models.cifar_registry import NETWORKS

    build = NETWORKS.get(name.removeprefix("cifar/"))
    if build is None:
        raise _unknown(name)
    if published:
        raise UserError(f"there are no published weights for {name}: pass a weights file, or train it")
    return build(num_classes)


def _from_timm(name: str, num_classes: int, published: bool, image_size: int | None) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"model {name!r} needs timm, which is not installed: pip install mimkd-ray[timm]") from error
    short = name.removeprefix("timm/")
    if not timm.is_model(short):
        raise UserError(f"unknown timm model {short!r}{nearest(short, timm.list_models())}; see timm.list_models()")
    options: dict[str, Any] = {}
    if image_size is not None and timm.get_pretrained_cfg_value(short, "fixed_input_size"):
        options["img_size"] = image_size
    if not published:
        return _sized(name, image_size, lambda: timm.create_model(short, num_classes=num_classes, **options))
    classes = timm.get_pretrained_cfg_value(short, "num_classes")
    if classes is None or not timm.is_model_pretrained(short):
        raise UserError(f"timm has no published weights for {short}: pass a weights file, or train it")
    if classes != num_classes:
        raise UserError(class_mismatch(f"published for {name}", classes, num_classes))
    return _download(name, lambda: timm.create_model(short, pretrained=True, **options))


def _from_function(name: str, num_classes: int, published: bool) -> nn.Module:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"model {name!r}: cannot import {module_name!r}: {error}; put its folder on PYTHONPATH, or "
            f"ship it with the job's working directory"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(
            f"model {name!r}: {module_name} has no function {function_name!r}{nearest(function_name, there)}"
        )
    if published:
        raise UserError(
            f"there are no published weights for {name}: let the function load them, or pass a weights file"
        )
    try:
        inspect.signature(function).bind(num_classes=num_classes)
    except TypeError as error:
        raise UserError(f"model {name!r}: called with num_classes={num_classes}, but {error}") from error
    model = function(num_classes=num_classes)
    if not isinstance(model, nn.Module):
        raise UserError(f"model {name!r} returned {type(model).__name__}, expected a torch.nn.Module")
    return model
