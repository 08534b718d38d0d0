"""Networks by name: torchvision's and timm's classifiers, the CIFAR networks, functions by import path."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from mimkd_ray import console
from mimkd_ray.errors import UserError, nearest
from mimkd_ray.models.published import of_timm, of_torchvision, own_network
from mimkd_ray.models.weights import class_mismatch, load_weights, new_head_line, put_state
from mimkd_ray.models.weights_file import FOLDER, HUB
from mimkd_ray.user_functions import call_named, named_function

_AUX = ("aux1.", "aux2.", "AuxLogits.")
_WITH_AUX = ("googlenet", "inception_v3")


def model_names() -> list[str]:
    """Return the names that `build_model` knows, sorted: torchvision's classifiers and cifar/NAME (without timm's)."""
    from mimkd_ray.models.cifar_registry import NETWORKS

    return sorted([*_torchvision_names(), *(f"cifar/{name}" for name in NETWORKS)])


def build_model(
    name: str, num_classes: int, weights: str = "random", image_size: int | None = None, new_head: bool = False
) -> nn.Module:
    """Build a network that maps images (B, 3, H, W) to logits (B, num_classes) in training and in evaluation.

    `weights`: "random", "published" (torchvision's default, timm's pretrained; downloaded) or a file, see
    `load_weights`. With `new_head`, weights for other classes leave the classifier random, and one line says so;
    otherwise they are refused. `image_size` (pixels) is passed to networks that are made for one size (ViT, MaxViT,
    timm's fixed ones); others ignore it. GoogLeNet and Inception come without auxiliary classifiers, and
    take images normalised by ImageNet's mean and standard deviation, whatever their weights. Raises UserError
    for unknown names, for weights that cannot be had or do not fit, and for functions that return no network.
    """
    if num_classes < 1:
        raise UserError(f"model {name!r}: {num_classes} classes, expected at least 1")
    published = weights == "published"
    if name.startswith((HUB, FOLDER)) and (own := own_network(name)[0]):
        return build_model(own, num_classes, name if published else weights, image_size, new_head)
    if name.startswith(("timm/", HUB, FOLDER)):
        model = _from_timm(name, num_classes, published, image_size, new_head)
    elif ":" in name:
        model = _from_function(name, num_classes, published)
    elif name.startswith("cifar/"):
        model = _from_cifar(name, num_classes, published)
    else:
        model = _from_torchvision(name, num_classes, published, image_size, new_head)
    if weights not in ("random", "published"):
        load_weights(model, weights, num_classes, _AUX if name in _WITH_AUX else (), new_head)
    # Lets messages name the network as the user did; not part of its state.
    vars(model)["zoo_name"] = name
    # By which `logits_of` knows them among other outputs.
    vars(model)["zoo_classes"] = num_classes
    return model


def _unknown(name: str) -> UserError:
    kinds = "a torchvision classifier, cifar/NAME, timm/NAME, hf-hub:ORG/NAME or package.module:function"
    return UserError(f"unknown model {name!r} (expected {kinds}){nearest(name, model_names())}")


def _torchvision_names() -> list[str]:
    from torchvision import models

    return models.list_models(module=models)


def _from_torchvision(
    name: str, num_classes: int, published: bool, image_size: int | None, new_head: bool
) -> nn.Module:
    from torchvision import models

    if name not in _torchvision_names():
        raise _unknown(name)
    options: dict[str, Any] = {}
    if name in _WITH_AUX:
        # Always the same input convention, so that a trained network can be saved and loaded like any other.
        options["transform_input"] = True
    if image_size is not None and name.startswith("vit_"):
        options["image_size"] = image_size
    if image_size is not None and name.startswith("maxvit"):
        options["input_size"] = (image_size, image_size)

    def random() -> nn.Module:
        # Initialising these two is slow, and batch norm makes it unnecessary.
        fast = {"aux_logits": False, "init_weights": False} if name in _WITH_AUX else {}
        return _sized(name, image_size, lambda: models.get_model(name, num_classes=num_classes, **options, **fast))

    if not published:
        return random()
    default = models.get_model_weights(name).DEFAULT
    classes = len(default.meta["categories"])
    if classes != num_classes and not new_head:
        raise UserError(class_mismatch(f"published for {name}", classes, num_classes))
    fixed = default.meta["min_size"][0]
    if "image_size" in options and image_size != fixed:
        raise UserError(
            f"published weights of {name} are for images of {fixed} pixels, not {image_size}: resize to {fixed}"
        )
    model = of_torchvision(name, default.url, options)
    if name in _WITH_AUX:
        vars(model)["aux_logits"] = False
        for head in ("aux1", "aux2") if name == "googlenet" else ("AuxLogits",):
            setattr(model, head, None)
    if classes == num_classes:
        return model
    fresh = random()
    put_state(fresh, {"": model.state_dict()}, f"published for {name}", num_classes, new_head=True)
    return fresh


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


def _from_timm(name: str, num_classes: int, published: bool, image_size: int | None, new_head: bool) -> nn.Module:
    found = of_timm(name)
    options: dict[str, Any] = {}
    if image_size is not None and found.fixed_size:
        options["img_size"] = image_size
    features = found.features()
    if features and num_classes == features:  # published without a classifier: it returns its features
        return _sized(name, image_size, lambda: found.build(pretrained=published, num_classes=0, **options))
    if not published:
        return _sized(name, image_size, lambda: found.build(pretrained=False, num_classes=num_classes, **options))
    if not found.published:
        raise UserError(f"timm has no published weights for {found.name}: pass a weights file, or train it")
    if features and not new_head:
        raise UserError(
            f"timm publishes {found.name} without a classifier: it returns {features} features; for a teacher pass "
            f"--teacher.classes {features}"
        )
    if found.classes == num_classes:
        return found.build(pretrained=True, **options)
    if not new_head:
        raise UserError(class_mismatch(f"published for {name}", found.classes, num_classes))
    # timm gives a network of other classes a new head, without a word.
    console.say_once(new_head_line(f"published for {name}", found.classes, num_classes))
    return found.build(pretrained=True, num_classes=num_classes, **options)


def _from_function(name: str, num_classes: int, published: bool) -> nn.Module:
    function = named_function("model", name)
    if published:
        raise UserError(
            f"there are no published weights for {name}: let the function load them, or pass a weights file"
        )
    try:
        inspect.signature(function).bind(num_classes=num_classes)
    except (TypeError, ValueError) as error:  # ValueError: a builtin that has no signature
        raise UserError(f"model {name!r}: called with num_classes={num_classes}, but {error}") from error
    model = call_named("model", name, function, num_classes=num_classes)
    if not isinstance(model, nn.Module):
        raise UserError(f"model {name!r} returned {type(model).__name__}, expected a torch.nn.Module")
    if "_orig_mod" in dict(model.named_children()):  # its layers cannot be read
        raise UserError(f"model {name!r} is compiled already: return the plain network, and pass --train.compile on")
    return model
