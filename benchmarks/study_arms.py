"""What the CIFAR-100 study trains: methods, what of each is tuned, and ablations; and what others have published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mimkd_ray.losses.config import LossConfig
from mimkd_ray.losses.methods import RIVALS
from mimkd_ray.train.config import Config

Change = Callable[[LossConfig], LossConfig]


def _set(**fields: Any) -> Change:
    return lambda loss: replace(loss, **fields)


METHODS: dict[str, Change] = {
    "alone": _set(name=()),
    "mimkd_paper": _set(preset="paper"),
    "mimkd": _set(preset="accuracy"),
    "mimkd_kd": _set(preset="accuracy", kd_weight=0.9),
    **{rival: _set(name=(rival,)) for rival in RIVALS},
}
"""The loss of each. mimkd_kd has the whole cross-entropy, as MIMKD has, and KD at its published 0.9."""

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
"""What is changed of `mimkd`, one thing each: terms, bound, negatives (of JSD, which InfoNCE cannot be read without),
temperature, and a shallower pair of taps besides the deepest. They train with mimkd's tuned weights."""

FACTORS = (1.0, 1 / 3, 3.0)
"""What a tuned weight is multiplied by, the published or default value first."""


def tuned(config: Config, method: str, factor: float) -> Config:
    """The config with the one thing that is tuned of a method multiplied: its weight; of the student alone the learning
    rate, by the square root of the factor."""
    loss = config.loss
    if method == "alone":
        return replace(config, optim=replace(config.optim, lr=config.optim.lr * factor**0.5))
    if method.startswith("mimkd"):
        weights = {
            f"{kind}_weight": getattr(loss, f"{kind}_weight") * factor for kind in ("global", "local", "feature")
        }
        return replace(config, loss=replace(loss, **weights))
    return replace(config, loss=replace(loss, rival_weight=loss.rival_weight * factor))


PUBLISHED: dict[str, dict[str, float]] = {
    "wrn_40_2_wrn_16_2": {"teacher": 75.61, "alone": 73.26, "kd": 74.92, "crd": 75.48, "review": 76.12, "dkd": 76.24},
    "resnet56_resnet20": {"teacher": 72.34, "alone": 69.06, "kd": 70.66, "crd": 71.16, "review": 71.89, "dkd": 71.97},
    "resnet110_resnet32": {"teacher": 74.31, "alone": 71.14, "kd": 73.08, "crd": 73.48, "review": 73.89, "dkd": 74.11},
    "resnet32x4_resnet8x4": {
        "teacher": 79.42,
        "alone": 72.50,
        "kd": 73.33,
        "crd": 75.51,
        "review": 75.63,
        "dkd": 76.32,
    },
    "vgg13_vgg8": {"teacher": 74.64, "alone": 70.36, "kd": 72.98, "crd": 73.94, "review": 74.85, "dkd": 74.68},
    "vgg13_mobilenetv2": {"teacher": 74.64, "alone": 64.60, "kd": 67.37, "crd": 69.73, "review": 70.37, "dkd": 69.71},
    "resnet50_mobilenetv2": {
        "teacher": 79.34,
        "alone": 64.60,
        "kd": 67.35,
        "crd": 69.11,
        "review": 69.89,
        "dkd": 70.35,
    },
    "resnet50_vgg8": {"teacher": 79.34, "alone": 70.36, "kd": 73.81, "crd": 74.30, "dkd": 75.34},
    "resnet32x4_shufflenetv1": {
        "teacher": 79.42,
        "alone": 70.50,
        "kd": 74.07,
        "crd": 75.11,
        "review": 77.45,
        "dkd": 76.45,
    },
    "resnet32x4_shufflenetv2": {
        "teacher": 79.42,
        "alone": 71.82,
        "kd": 74.45,
        "crd": 75.65,
        "review": 77.78,
        "dkd": 77.07,
    },
    "resnet50_shufflenetv2": {"teacher": 79.34, "alone": 71.82, "mimkd_paper": 74.55},
}
"""Top-1 on CIFAR-100 after 240 epochs, by recipe: the tables of CRD, ReviewKD and DKD. MIMKD's own 74.55 belongs to a
student of 69.8 alone."""
