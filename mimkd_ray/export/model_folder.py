"""model.safetensors and config.json, as timm and the Hugging Face hub name and read them.

A student of timm's gets timm's own config.json. One of torchvision's, and a cifar/ one, gets the same form with
`torchvision/NAME` or `cifar/NAME` as architecture, which `local-dir:FOLDER` and `hf-hub:ORG/NAME` of this package read.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from mimkd_ray.config import DataConfig
from mimkd_ray.models.outputs import describe
from mimkd_ray.models.published import OWN, TORCHVISION
from mimkd_ray.models.weights_file import FOLDER, HUB

WEIGHTS, CONFIG = "model.safetensors", "config.json"


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
        "crop_pct": 224 / 256 if data.pipeline.startswith("imagenet") else 1.0,
        "num_classes": num_classes,
    }
    labels = {"label_names": list(classes)} if len(classes) == num_classes else {}
    if name.startswith(("timm/", HUB, FOLDER)) and hasattr(model, "pretrained_cfg"):
        from timm.models import save_for_hf

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cfg: dict[str, Any] = {"pretrained_cfg": preprocessing, "num_classes": num_classes, **labels}
            save_for_hf(model, str(folder), cfg, safe_serialization=True)
        return
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / WEIGHTS)
    architecture = name if name.startswith(OWN) or ":" in name else TORCHVISION + name
    config = {
        "architecture": architecture,
        "num_classes": num_classes,
        **labels,
        "pretrained_cfg": preprocessing,
        "library_name": "mimkd_ray",
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
