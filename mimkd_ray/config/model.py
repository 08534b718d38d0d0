"""Section `student`: the network and its initial weights."""

from __future__ import annotations

from dataclasses import dataclass

from mimkd_ray.config.form.values import check_values
from mimkd_ray.errors import UserError
from mimkd_ray.secret_urls import hide


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A network and its initial weights."""

    name: str
    """torchvision name, cifar/NAME, timm/NAME, hf-hub:ORG/NAME, local-dir:FOLDER or package.module:function."""
    weights: str = "random"
    """random, published, a .safetensors, .pth, .ckpt ... file (path or URL), hf-hub:ORG/NAME or local-dir:FOLDER.
    A student whose weights are of other classes has a new classifier."""
    head_epochs: int = 0
    """Epochs at the start in which the student's classifier alone is trained."""

    def __post_init__(self) -> None:
        """Check what can be checked without importing anything."""
        check_values(self, "student", head_epochs=(0, 10**6))
        hide(self, "weights")
        for field in ("name", "weights"):
            if not getattr(self, field).strip():
                raise UserError(f"model {field} is empty: pass e.g. name 'resnet34', weights 'random'")
