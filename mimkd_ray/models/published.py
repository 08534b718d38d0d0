"""Networks of torchvision, timm and the Hugging Face hub with the weights that these publish, which are downloaded."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

from mimkd_ray.errors import UserError, nearest
from mimkd_ray.models.weights_file import CONFIG, FOLDER, HUB, bring, cause, from_hub, hub_file

CIFAR, TORCHVISION = "cifar/", "torchvision/"
OWN = (CIFAR, TORCHVISION)
"""Beginnings of architectures that are not timm's, in the config.json of exported students (export/model_folder.py)."""
OWN_KEY = "mimkd_ray"
"""Under which such an architecture stands there, beside the name by which timm knows a network."""


@dataclass(frozen=True)
class OfTimm:
    """A network that timm builds."""

    name: str
    """As timm knows it."""
    create: Callable[..., nn.Module]
    classes: int
    """Of the published weights; 0: there are none."""
    settings: Mapping[str, Any]
    """timm's `pretrained_cfg`: among others input_size, mean, std and interpolation."""
    fixed_size: bool
    """It is made for one image size, and is told which."""
    advice: str
    """What to do where nothing can be downloaded."""

    @property
    def published(self) -> bool:
        """True if there are published weights, with a classifier or without one."""
        return bool(self.classes or self.settings.get("num_classes") == 0)

    def features(self) -> int:
        """Width of what the network returns if it is published without a classifier, as DINOv2 is; else 0."""
        if self.classes or not self.published:
            return 0
        with contextlib.suppress(Exception), torch.device("meta"):  # constructors that read values say so for real
            return _width(self.create(self.name, pretrained=False, num_classes=0))
        return _width(self.create(self.name, pretrained=False, num_classes=0))

    def build(self, pretrained: bool, **options: Any) -> nn.Module:
        """The network; errors of downloads are UserErrors, those of building random networks are timm's own."""
        if not pretrained:
            return self.create(self.name, pretrained=False, **options)
        return download(self.name, self.advice, lambda: self.create(self.name, pretrained=True, **options))


def download(name: str, advice: str, make: Callable[[], Any]) -> Any:
    """Return what `make` downloads; whatever goes wrong on the network is told with the way around it."""
    try:
        return make()
    except Exception as error:  # each hub's client has its own exceptions; the cause is in the message
        raise UserError(f"published weights of {name} could not be downloaded: {cause(error)}; {advice}") from error


def of_torchvision(name: str, url: str, options: Mapping[str, Any]) -> nn.Module:
    """A network of torchvision with its default weights, which are at `url`."""
    from torchvision import models

    return download(
        name, bring(url, _hub_place(url)), lambda: models.get_model(name, weights="DEFAULT", progress=False, **options)
    )


def of_timm(name: str) -> OfTimm:
    """What timm/NAME, hf-hub:ORG/NAME or local-dir:FOLDER is. Raises UserError where there is no such network."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"model {name!r} needs timm, which is not installed: pip install mimkd-ray[timm]") from error
    short = name.removeprefix("timm/")
    if short.startswith((HUB, FOLDER)):
        return _of_hub(short, timm.create_model)
    if not timm.is_model(short):
        raise UserError(f"unknown timm model {short!r}{nearest(short, timm.list_models())}; see timm.list_models()")
    config = timm.get_pretrained_cfg(short)
    published = config is not None and timm.is_model_pretrained(short)
    return OfTimm(
        short,
        timm.create_model,
        (config.num_classes or 0) if published else 0,
        config.to_dict() if published else {},
        bool(timm.get_pretrained_cfg_value(short, "fixed_input_size")),
        _advice(config) if published else "",
    )


def _width(model: Any) -> int:
    """Features of a network of timm without its classifier."""
    return int(getattr(model, "head_hidden_size", None) or model.num_features)


def own_network(name: str) -> tuple[str, Mapping[str, Any]]:
    """The name by which `build_model` knows the network of hf-hub:ORG/NAME or local-dir:FOLDER, and its settings, if it
    is of this package or torchvision; ("", {}) for timm's. Raises UserError where its config.json cannot be read.

    Networks that a file names by an import path are not built: a file from elsewhere does not choose what is run.
    """
    if name.startswith(HUB):
        model = name.removeprefix(HUB)
        try:
            import huggingface_hub  # noqa: F401
        except ImportError:
            return "", {}  # timm, which is asked next, needs it too and says so
        path = download(name, bring_folder(model), lambda: from_hub(model, CONFIG))
    else:
        path = os.path.join(name.removeprefix(FOLDER), CONFIG)
    architecture, settings = _config_at(path, name)
    return (architecture.removeprefix(TORCHVISION), settings) if architecture.startswith(OWN) else ("", {})


def bring_folder(model: str) -> str:
    """Return what to do about a model of the hub on a machine without network."""
    return (
        f"bring the folder of {hub_file(model)} with its config.json from a machine with network, and name the "
        f"network {FOLDER}FOLDER"
    )


def _of_hub(name: str, create: Callable[..., nn.Module]) -> OfTimm:
    import timm
    from timm.models import load_model_config_from_hf

    if name.startswith(HUB):
        model = name.removeprefix(HUB)
        advice = bring_folder(model)
        config, made_by, _ = download(name, advice, lambda: load_model_config_from_hf(model))
        classes = config.get("num_classes")
    else:
        advice = ""
        made_by, config = _config_at(os.path.join(name.removeprefix(FOLDER), CONFIG), name)
        classes = config.get("num_classes")
    if not timm.is_model(made_by):
        raise UserError(f"model {name!r} is a {made_by!r}, which this timm does not know: timm's own models work")
    fixed = bool(timm.get_pretrained_cfg_value(made_by, "fixed_input_size"))
    return OfTimm(name, create, int(classes or 0), config, fixed, advice)


def _config_at(path: str, name: str) -> tuple[str, dict[str, Any]]:
    """The architecture and the settings in a config.json."""
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
        if "model_type" in config and "architecture" not in config:
            place = name.removeprefix(HUB).removeprefix(FOLDER)
            raise UserError(
                f"model {name!r} is a {config['model_type']} of Hugging Face's transformers, and not of timm: name a "
                f"function package.module:function(num_classes) that returns AutoModel.from_pretrained({place!r}), as "
                "docs/teachers.md shows"
            )
        inner = config.get("pretrained_cfg", config)
        return str(config.get(OWN_KEY) or config["architecture"]), {
            **inner,
            "num_classes": config.get("num_classes", inner.get("num_classes")),
        }
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"model {name!r}: {path} cannot be read as timm writes it ({type(error).__name__}: {error}); pass a folder "
            "with the config.json and the model.safetensors of a timm model"
        ) from error


def _advice(config: Any) -> str:
    if config.hf_hub_id:
        return bring(hub_file(config.hf_hub_id, config.hf_hub_filename or "model.safetensors"))
    return bring(config.url, _hub_place(config.url)) if config.url else "pass a weights file"


def _hub_place(url: str) -> str:
    """Where torch.hub keeps what it downloads from `url`."""
    return os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(urlsplit(url).path))
