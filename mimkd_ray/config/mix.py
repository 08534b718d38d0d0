"""Section `mix`: mixing of images within a lane."""

from __future__ import annotations

from dataclasses import dataclass

from mimkd_ray.config.form.values import FROM_0, check_values


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Mixing of the images of a batch; off by default."""

    mixup_alpha: float = 0.0
    """Alpha of mixup, whose share of the image itself is drawn from Beta(alpha, alpha); 0 = no mixup. ImageNet: 0.2."""
    cutmix_alpha: float = 0.0
    """Alpha of CutMix, whose share of the area is drawn from Beta(alpha, alpha); 0 = no CutMix. ImageNet: 1.0."""
    probability: float = 1.0
    """Share of the batches that are mixed."""
    switch_probability: float = 0.5
    """Share of the mixed batches that get CutMix, if both are on."""

    def __post_init__(self) -> None:
        shares = {"probability": (0, 1), "switch_probability": (0, 1)}
        check_values(self, "mix", mixup_alpha=FROM_0, cutmix_alpha=FROM_0, **shares)

    @property
    def active(self) -> bool:
        """True if any batch is mixed."""
        return self.probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)
