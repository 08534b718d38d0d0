"""Section `student`: which network, and where its weights come from."""

from __future__ import annotations

from dataclasses import dataclass

from mimkd_ray.errors import UserError
from mimkd_ray.secret_urls import hide


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network, and where its weights come from."""

    name: str
    """torchvision name (resnet34), cifar/NAME, timm/NAME, or package.module:function."""
    weights: str = "random"
    """random, published, or a .safetensors, .pt, .pth or .bin file (local or any fsspec URL)."""

    def __post_init__(self) -> None:
        """Check what can be checked without importing anything."""
        hide(self, "weights")
        for field in ("name", "weights"):
            if not getattr(self, field).strip():
                raise UserError(f"model {field} is empty: pass e.g. name 'resnet34', weights 'random'")
