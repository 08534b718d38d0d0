"""The network that leaves: images to logits and nothing else, with the normalisation inside where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mimkd_ray.models.outputs import logits_of


class Deployed(nn.Module):
    """A classifier in evaluation mode, float32, on the CPU, that returns logits (B, classes) as one tensor.

    Without ``normalize`` it takes normalised images, with it images of values in 0..1.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], normalize: bool) -> None:
        super().__init__()
        self.model = model
        self.normalize = normalize
        scale, shift = [1 / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
        self.register_buffer("scale", torch.tensor(scale).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, classes)."""
        if self.normalize:
            images_BCHW = images_BCHW * self.scale + self.shift
        return logits_of(self.model, self.model(images_BCHW))

    def inputs(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 images as this network takes them."""
        values = pixels_BCHW.float() / 255
        return values if self.normalize else values * self.scale + self.shift
