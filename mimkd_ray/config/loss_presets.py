"""The presets of the loss: values of the fields that the config leaves unset.

`accuracy` and `best` had the highest accuracy on held-out training images of a small CPU study (docs/accuracy.md),
`paper` is our reading of arXiv 2110.15946, and `two_sided` is the default of release 0.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from mimkd_ray.config.critic import StudentSide, TeacherSide

BoundName = Literal["infonce", "jsd", "dv", "nwj", "smile"]
Negatives = Literal["all", "rolled", "queue", "step", "cache"]
Kind = Literal["global", "local", "feature"]
SameClass = Literal["keep", "leave_out"]
PresetName = Literal["accuracy", "best", "paper", "two_sided"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The fields of the loss that a preset sets."""

    bound: BoundName
    negatives: Negatives
    same_class: SameClass = "keep"
    locations: int
    teacher: TeacherSide
    student: StudentSide
    learn_temperature: bool
    weights: Mapping[Kind, float] = field(default_factory=dict)
    ce_weight: float = 1.0
    kd_weight: float = 0.0


_ACCURACY = Preset(
    bound="infonce",
    negatives="queue",
    same_class="leave_out",
    locations=64,
    teacher="frozen",
    student="linear",
    learn_temperature=False,
    weights={"global": 10.0, "local": 0.0, "feature": 3.0},
)
_TWO_SIDED = Preset(
    bound="infonce",
    negatives="all",
    locations=64,
    teacher="mlp",
    student="mlp",
    learn_temperature=True,
    weights={"global": 0.1, "local": 0.1, "feature": 1.0},
)

PRESETS: dict[PresetName, Preset] = {
    "accuracy": _ACCURACY,
    "best": replace(_ACCURACY, ce_weight=0.1, kd_weight=0.9),
    "paper": replace(_TWO_SIDED, bound="jsd", negatives="rolled", locations=0),
    "two_sided": _TWO_SIDED,
}
