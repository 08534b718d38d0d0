"""config.json of an exported student, as timm reads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mimkd_ray.config import DataConfig
from mimkd_ray.data.augment.pipelines import make_pipeline
from mimkd_ray.data.augment.transforms import ResizedCropFlip, Transform
from mimkd_ray.export.model_folder import write_model_folder


def training_alone(size: int) -> Transform:
    """A pipeline whose evaluation is ImageNet's."""
    return ResizedCropFlip(size)


@pytest.mark.parametrize("pipeline", ["imagenet", "cifar", "none", f"{__name__}:training_alone"])
def test_timm_evaluates_the_same_pixels(tmp_path: Path, pipeline: str) -> None:
    data = pytest.importorskip("timm.data")
    config = DataConfig(pipeline=pipeline, image_size=56)
    network = nn.Linear(2, 3)
    vars(network)["zoo_name"] = "my.networks:line"
    write_model_folder(network, config, (), 3, tmp_path)
    takes = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    picture = Image.fromarray(noise).resize((90, 70), Image.Resampling.BICUBIC)
    theirs: Tensor = data.create_transform(**data.resolve_data_config(pretrained_cfg=takes))(picture)
    own = make_pipeline(pipeline, 56).eval(torch.from_numpy(np.array(picture)).permute(2, 0, 1)) / 255
    ours = (own - torch.tensor(config.mean).view(3, 1, 1)) / torch.tensor(config.std).view(3, 1, 1)
    torch.testing.assert_close(theirs, ours, atol=0.05, rtol=0)  # Pillow's resizing and torch's
