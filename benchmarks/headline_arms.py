"""The arms of the headline study: the loss of each student."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mimkd_ray.config import CriticConfig, LossConfig

Change = Callable[[LossConfig], LossConfig]


def _loss(**fields: Any) -> LossConfig:
    return LossConfig(**({"queue": 4096} | fields))


def _two_sided(**critic: Any) -> LossConfig:
    return LossConfig(preset="two_sided", critic=CriticConfig(**critic))


GLOBAL = {"global_weight": 10.0, "local_weight": 0.0, "feature_weight": 0.0}
LANE: dict[str, Any] = {**GLOBAL, "negatives": "all", "same_class": "keep"}
BASE: dict[str, Any] = {**GLOBAL, "negatives": "queue", "same_class": "leave_out"}

STANDARDISED: dict[str, Any] = {"kd_logits": "standardised", "kd_temperature": 2.0}

BASELINES: dict[str, LossConfig] = {
    "alone": _loss(name=()),
    "kd": _loss(name=("kd",)),
    "kd_standardised": _loss(name=(), ce_weight=0.1, kd_weight=9.0, **STANDARDISED),
    "two_sided": _two_sided(),
    "two_sided_fixed_temperature": _two_sided(learn_temperature=False),
    "two_sided_clamp_0.05": _two_sided(min_temperature=0.05),
    "two_sided_kd": replace(_two_sided(), kd_weight=0.9),
    "crd": _loss(name=("crd",)),
}
"""The student alone, KD on raw and on standardised logits, the default of release 0.1, and CRD."""

SIDES: dict[str, LossConfig] = {
    "linear_both_3": _loss(**{**LANE, "global_weight": 3.0}, critic=CriticConfig(teacher="linear", student="linear")),
    "frozen_3": _loss(**{**LANE, "global_weight": 3.0}),
    "frozen": _loss(**LANE),
    "queue_same_class_kept": _loss(**{**BASE, "same_class": "keep"}),
    "queue": _loss(**BASE),
    "queue_mlp_student": _loss(**BASE, critic=CriticConfig(student="mlp")),
}
"""Arms that vary the critic's sides and the negatives. `queue` is the base, of which the others change one option."""

OPTIONS: dict[str, LossConfig] = {
    "symmetric": _loss(**BASE, symmetric=True),
    "soft_0.1": _loss(**BASE, soft_temperature=0.1),
    "hard_0.25": _loss(**BASE, hard_share=0.25),
    "temperature_0.2": _loss(**BASE, critic=CriticConfig(temperature=0.2)),
    "temperature_0.07": _loss(**BASE, critic=CriticConfig(temperature=0.07)),
    "weight_3": _loss(**{**BASE, "global_weight": 3.0}),
    "weight_30": _loss(**{**BASE, "global_weight": 30.0}),
}
TWO_STAGES: dict[str, Any] = {"feature_pairs": ("stage3:stage3", "stage3:stage2"), "pair_weights": "shared"}

TERMS: dict[str, LossConfig] = {
    "feature_3": _loss(**{**BASE, "feature_weight": 3.0}),
    "feature_3_all_locations": _loss(**{**BASE, "feature_weight": 3.0}, feature_negatives="all"),
    "feature_10_only": _loss(**{**BASE, "global_weight": 0.0, "feature_weight": 10.0}),
    "feature_3_width_512": _loss(**{**BASE, "feature_weight": 3.0}, critic=CriticConfig(frozen_width=512)),
    "feature_3_width_256": _loss(**{**BASE, "feature_weight": 3.0}, critic=CriticConfig(frozen_width=256)),
    "feature_3_width_128": _loss(**{**BASE, "feature_weight": 3.0}, critic=CriticConfig(frozen_width=128)),
    "before_relu": _loss(**{**BASE, "feature_weight": 3.0}, taps="before"),
    "local_3": _loss(**{**BASE, "local_weight": 3.0}),
    "two_stages": _loss(**{**BASE, "feature_weight": 3.0}, **TWO_STAGES),
    "logits_tap": _loss(**BASE, global_pairs=("pool:pool", "logits:logits:0.3")),
}
OVER_TIME: dict[str, LossConfig] = {
    "fall": _loss(**BASE, schedule="fall"),
    "rise": _loss(**BASE, schedule="rise"),
    "warmup": _loss(**BASE, schedule="warmup"),
    "ce_0.1": _loss(**BASE, ce_weight=0.1),
}
WITH_LOGITS: dict[str, LossConfig] = {
    "kd_0.9": _loss(**BASE, kd_weight=0.9),
    "kd_0.9_ce_0.1": _loss(**BASE, kd_weight=0.9, ce_weight=0.1),
    "dkd": _loss(**BASE, name=("mimkd", "dkd"), rival_warmup=3.0),
    "dist": _loss(**BASE, name=("mimkd", "dist")),
    "best": _loss(preset="best"),
    "best_all_locations": _loss(preset="best", feature_negatives="all"),
    "best_all_locations_two_stages": _loss(preset="best", feature_negatives="all", **TWO_STAGES),
    "best_kd_3": _loss(preset="best", kd_weight=3.0),
    "best_standardised_3": _loss(preset="best", kd_weight=3.0, **STANDARDISED),
    "best_standardised_9": _loss(preset="best", kd_weight=9.0, **STANDARDISED),
}

FIRST = ("alone", "kd", "two_sided", "queue", "feature_3", "best", "feature_3_all_locations", "dist")
"""The eight arms that a GPU trains first."""

ARMS: dict[str, LossConfig] = BASELINES | SIDES | OPTIONS | TERMS | OVER_TIME | WITH_LOGITS
