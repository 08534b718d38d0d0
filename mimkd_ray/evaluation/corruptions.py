"""Common corruptions of images that torchvision can make, in five severities.

The kinds are those of Hendrycks and Dietterich 2019 ("Benchmarking neural network robustness to common corruptions and
perturbations") that need no other package; the strengths are our own, so that figures compare with each other and not
with ImageNet-C's.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SEVERITIES = (1, 2, 3, 4, 5)


def _functional() -> Any:
    """torchvision's functions of images. Its import takes as long as torch's, and a run writes its page without."""
    from torchvision.transforms.v2 import functional

    return functional


def _noise(images_BCHW: Tensor, severity: int) -> Tensor:
    generator = torch.Generator().manual_seed(severity)
    noise = torch.randn(images_BCHW.shape, generator=generator).to(images_BCHW.device)
    sigma = (0.04, 0.08, 0.12, 0.18, 0.26)[severity - 1]
    return (images_BCHW.float() + 255 * sigma * noise).round().clamp(0, 255).to(torch.uint8)


def _blur(images_BCHW: Tensor, severity: int) -> Tensor:
    sigma = (0.4, 0.6, 0.9, 1.3, 1.8)[severity - 1] * max(1.0, images_BCHW.shape[-1] / 64)
    return _functional().gaussian_blur(images_BCHW, [2 * round(3 * sigma) + 1] * 2, [sigma, sigma])


def _pixelate(images_BCHW: Tensor, severity: int) -> Tensor:
    height, width = images_BCHW.shape[-2:]
    share = (0.75, 0.5, 0.35, 0.25, 0.15)[severity - 1]
    functional, small = _functional(), [max(1, round(height * share)), max(1, round(width * share))]
    pixels_BCHW = functional.resize(images_BCHW, small, antialias=True)
    return functional.resize(pixels_BCHW, [height, width], interpolation=functional.InterpolationMode.NEAREST)


def _jpeg(images_BCHW: Tensor, severity: int) -> Tensor:
    quality = (50, 35, 25, 15, 8)[severity - 1]
    made = []
    for image_HWC in images_BCHW.permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image_HWC).save(file, "JPEG", quality=quality)
        made.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(made).permute(0, 3, 1, 2).to(images_BCHW.device)


def _brightness(images_BCHW: Tensor, severity: int) -> Tensor:
    return _functional().adjust_brightness(images_BCHW, (1.2, 1.4, 1.6, 1.8, 2.0)[severity - 1])


def _contrast(images_BCHW: Tensor, severity: int) -> Tensor:
    return _functional().adjust_contrast(images_BCHW, (0.75, 0.6, 0.45, 0.3, 0.2)[severity - 1])


def _posterize(images_BCHW: Tensor, severity: int) -> Tensor:
    return _functional().posterize(images_BCHW, (5, 4, 3, 2, 1)[severity - 1])


Corruption = Callable[[Tensor, int], Tensor]
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": _noise,
    "gaussian_blur": _blur,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
    "brightness": _brightness,
    "contrast": _contrast,
    "posterize": _posterize,
}
"""Name to a function of uint8 images (B, 3, H, W) and the severity, 1 to 5, which returns the same shape and type."""
