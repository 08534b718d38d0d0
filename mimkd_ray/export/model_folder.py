"""model.safetensors and config.json, as timm and the Hugging Face hub name and read them.

A student of timm's gets timm's own config.json. One of torchvision's, and a cifar/ one, gets the same form with
`torchvision/NAME` or `cifar/NAME` as architecture, which `local-dir:FOLDER` and `hf-hub:ORG/NAME` of this package read.
Torchvision's networks that timm has with the same parameters have timm's names there, and ours beside it.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from mimkd_ray.config import DataConfig
from mimkd_ray.data.augment.pipelines import make_pipeline
from mimkd_ray.data.augment.transforms import CentreCrop, FitSize
from mimkd_ray.models.build_model import build_model
from mimkd_ray.models.checkpoint_keys import MOBILENET_V2_IN_TIMM
from mimkd_ray.models.outputs import describe
from mimkd_ray.models.published import OWN, OWN_KEY, TORCHVISION
from mimkd_ray.models.weights_file import FOLDER, HUB

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def is_of_timm(network: str) -> bool:
    """Say whether timm makes the network of this name."""
    return network.startswith(("timm/", HUB, FOLDER))


def is_read_by_timm(network: str) -> bool:
    """Say whether timm reads the folder."""
    return is_of_timm(network) or bool(_name_in_timm(network))


def _name_in_timm(network: str) -> str:
    """Return timm's name of a network of torchvision's that it has with the same parameters; "" for others."""
    if network == "mobilenet_v2":
        return "mobilenetv2_100"
    return network if re.fullmatch(r"(wide_)?(resnet|resnext|densenet)\w+", network) else ""


def write_model_folder(
    model: nn.Module, data: DataConfig, classes: Sequence[str], num_classes: int, folder: Path
) -> None:
    """Write both files of a network that `build_model` made. ``classes`` are their names."""
    name = describe(model)
    preprocessing = {
        "input_size": (3, data.image_size, data.image_size),
        "mean": data.mean,
        "std": data.std,
        "interpolation": "bilinear",
        **_framing(data),
        "num_classes": num_classes,
    }
    labels = {"label_names": list(classes)} if len(classes) == num_classes else {}
    if is_of_timm(name):
        from timm.models import save_for_hf

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cfg: dict[str, Any] = {"pretrained_cfg": preprocessing, "num_classes": num_classes, **labels}
            save_for_hf(model, str(folder), cfg, safe_serialization=True)
        return
    # Copies: layers may share a tensor, which safetensors refuses.
    state = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
    if name == "mobilenet_v2":
        modules = {key: key.rpartition(".") for key in state}
        state = {f"{MOBILENET_V2_IN_TIMM[part]}.{last}": state[key] for key, (part, _, last) in modules.items()}
    save_file(state, folder / WEIGHTS)
    own = name if name.startswith(OWN) or ":" in name else TORCHVISION + name
    in_timm = _name_in_timm(name)
    config = {
        **({"architecture": in_timm, OWN_KEY: own} if in_timm else {"architecture": own}),
        "num_classes": num_classes,
        **labels,
        "pretrained_cfg": preprocessing,
        "library_name": "timm" if in_timm else "mimkd_ray",
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _framing(data: DataConfig) -> dict[str, Any]:
    """Return in timm's words how evaluation brings an image to its size. Nothing can be said of a user's own way."""
    own = make_pipeline(data.pipeline, data.image_size).eval
    if getattr(own, "transform", own) == CentreCrop(data.image_size):
        return {"crop_pct": 224 / 256, "crop_mode": "center"}
    return {"crop_pct": 1.0, **({"crop_mode": "squash"} if own == FitSize(data.image_size) else {})}


def read_model_folder(folder: Path, name: str, num_classes: int, image_size: int) -> nn.Module:
    """Return the network that a user gets from both files. ``name`` is what `describe` says of the one written: a
    function of the user's own is named beside the folder."""
    place = f"{FOLDER}{folder}"
    if ":" in name and not is_of_timm(name):
        return build_model(name, num_classes, place, image_size)
    return build_model(place, num_classes, "published", image_size)
