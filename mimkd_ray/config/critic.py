"""Section `loss.critic`: the network that scores a pair of features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mimkd_ray.config.form.values import check_values
from mimkd_ray.errors import UserError

TeacherSide = Literal["frozen", "linear", "mlp"]

StudentSide = Literal["linear", "mlp"]


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The network that scores a pair of features."""

    kind: Literal["dot", "concat"] = "dot"
    """dot: scaled cosine of two embeddings. concat: a small network on the joined features, whose channels are
    standardised by their running statistics."""
    teacher: TeacherSide | None = None
    """Layers of the dot critic on teacher features. frozen: none; the features are centred by their running mean, and
    the student's are mapped into their space. linear: one linear layer. mlp: two layers and a shortcut. Unset: the
    preset's."""
    student: StudentSide | None = None
    """Layers of the dot critic on student features, linear or mlp. Unset: the preset's."""
    width: int = 128
    """Units of hidden layers, and of the embeddings unless the teacher side is frozen."""
    frozen_width: int = 1024
    """Most channels of a frozen teacher side; features with more are projected on this many fixed orthogonal
    directions."""
    temperature: float = 0.1
    """Temperature of the dot critic, or its initial value: score = cosine / temperature + bias."""
    learn_temperature: bool | None = None
    """Train the temperature (never below min_temperature), or keep it fixed. Unset: the preset's."""
    min_temperature: float = 0.01
    """Lower limit of a learned temperature, which would otherwise shrink without bound."""

    def __post_init__(self) -> None:
        check_values(self, "loss.critic", width=(1, 65_536), frozen_width=(1, 65_536))
        if self.kind == "concat" and (self.teacher, self.student) != (None, None):
            raise UserError(
                f"loss.critic.kind is concat, which has no sides, and loss.critic.teacher is {self.teacher}, student "
                f"{self.student}: leave them out, or pass --loss.critic.kind dot"
            )
        if not 0 < self.min_temperature <= self.temperature:
            raise UserError(
                f"loss.critic.temperature is {self.temperature} and min_temperature {self.min_temperature}; "
                "0 < min_temperature <= temperature is needed: pass a lower --loss.critic.min-temperature too"
            )
