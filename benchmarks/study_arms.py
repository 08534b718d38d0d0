"""The arms of the CIFAR-100 study: methods, their tuned field, and ablations; and published results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mimkd_ray.config import Config, LossConfig
from mimkd_ray.losses.methods.registry import RIVALS

Change = Callable[[LossConfig], LossConfig]


def _set(**fields: Any) -> Change:
    return lambda loss: replace(loss, **fields)


METHODS: dict[str, Change] = {
    "alone": _set(name=()),
    "mimkd_paper": _set(preset="paper"),
    "mimkd": _set(preset="two_sided"),
    "mimkd_kd": _set(preset="two_sided", kd_weight=0.9),
    "accuracy": _set(preset="accuracy"),
    "best": _set(preset="best"),
    **{rival: _set(name=(rival,)) for rival in RIVALS},
}
"""The loss of each method. mimkd is the default of release 0.1, with critics that learn on both sides; mimkd_kd has the
whole cross-entropy, as that has, and KD at its published 0.9. accuracy and best are today's presets (headline.py)."""

ABLATIONS: dict[str, Change] = {
    "feature_only": _set(global_weight=0.0, local_weight=0.0),
    "global_only": _set(local_weight=0.0, feature_weight=0.0),
    "local_only": _set(global_weight=0.0, feature_weight=0.0),
    "jsd": _set(bound="jsd"),
    "dv": _set(bound="dv"),
    "rolled": _set(bound="jsd", negatives="rolled"),
    "fixed_temperature": lambda loss: replace(loss, critic=replace(loss.critic, learn_temperature=False)),
    "two_stages": _set(feature_pairs=("stage2:stage2", "stage3:stage3")),
}
"""Ablations of `mimkd`, each with one change: terms, bound, negatives (of JSD, because InfoNCE needs many),
temperature, and a shallower pair of taps besides the deepest. They train with mimkd's tuned weights."""

FACTORS = (1.0, 1 / 3, 3.0, 1 / 10, 10.0)
"""Factors on a tuned weight, the published or default value first."""


def tuned(config: Config, method: str, factor: float) -> Config:
    """Return the config with the tuned field of a method multiplied: its weight, or for the student alone the learning
    rate, by the square root of the factor."""
    loss = config.loss
    if method == "alone":
        return replace(config, optim=replace(config.optim, lr=config.optim.lr * factor**0.5))
    if "mimkd" in loss.name:
        return replace(
            config,
            loss=replace(
                loss,
                global_weight=loss.weight("global") * factor,
                local_weight=loss.weight("local") * factor,
                feature_weight=loss.weight("feature") * factor,
            ),
        )
    return replace(config, loss=replace(loss, rival_weight=loss.rival_weight * factor))


_COLUMNS = ("teacher", "alone", "kd", "crd", "review", "dkd")
_ROWS: dict[str, tuple[float | None, ...]] = {
    "wrn_40_2_wrn_16_2": (75.61, 73.26, 74.92, 75.48, 76.12, 76.24),
    "resnet56_resnet20": (72.34, 69.06, 70.66, 71.16, 71.89, 71.97),
    "resnet110_resnet32": (74.31, 71.14, 73.08, 73.48, 73.89, 74.11),
    "resnet32x4_resnet8x4": (79.42, 72.50, 73.33, 75.51, 75.63, 76.32),
    "vgg13_vgg8": (74.64, 70.36, 72.98, 73.94, 74.85, 74.68),
    "vgg13_mobilenetv2": (74.64, 64.60, 67.37, 69.73, 70.37, 69.71),
    "resnet50_mobilenetv2": (79.34, 64.60, 67.35, 69.11, 69.89, 70.35),
    "resnet50_vgg8": (79.34, 70.36, 73.81, 74.30, None, 75.34),
    "resnet32x4_shufflenetv1": (79.42, 70.50, 74.07, 75.11, 77.45, 76.45),
    "resnet32x4_shufflenetv2": (79.42, 71.82, 74.45, 75.65, 77.78, 77.07),
    "resnet50_shufflenetv2": (79.34, 71.82, None, None, None, None),
}
PUBLISHED: dict[str, dict[str, float]] = {
    pair: {method: top1 for method, top1 in zip(_COLUMNS, row, strict=True) if top1 is not None}
    for pair, row in _ROWS.items()
}
PUBLISHED["resnet50_shufflenetv2"]["mimkd_paper"] = 74.55  # of a student of 69.8 alone
"""Top-1 on CIFAR-100 after 240 epochs, by recipe and method: the tables of CRD, ReviewKD, DKD and MIMKD."""
