"""Section `loss.critic`: the network that scores a pair of features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mimkd_ray.errors import UserError

TeacherSide = Literal["frozen", "linear", "mlp"]

StudentSide = Literal["linear", "mlp"]


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The network that scores a pair of features."""

    kind: Literal["dot", "concat"] = "dot"
    """dot: scaled cosine of two embeddings. concat: a small network on the joined features, whose
    channels are standardised by their running statistics."""
    teacher: TeacherSide | None = None
    """What the dot critic may do to teacher features. frozen: nothing; they are centred by their running mean, and the
    student is mapped into their space. linear: one linear layer. mlp: two layers and a shortcut. Unset: the
    preset's."""
    student: StudentSide | None = None
    """What maps student features to where they are compared. Unset: the preset's."""
    width: int = 128
    """Units of hidden layers, and of the embeddings where the teacher's side is not frozen."""
    frozen_width: int = 1024
    """A frozen side's features of more channels are projected on as many fixed orthogonal directions."""
    temperature: float = 0.1
    """Temperature of the dot critic, or its start: score = cosine / temperature + bias."""
    learn_temperature: bool | None = None
    """Train the temperature (never below min_temperature), or keep it fixed. Unset: the preset's."""
    min_temperature: float = 0.01
    """Lower limit of a learned temperature; without one it runs away."""

    def __post_init__(self) -> None:
        if min(self.width, self.frozen_width) < 1:
            raise UserError(
                f"loss.critic.width is {self.width} and frozen_width {self.frozen_width}; they must be at least 1"
            )
        if self.kind == "concat" and (self.teacher, self.student) != (None, None):
            raise UserError(
                f"loss.critic.kind is concat, which has no sides, and loss.critic.teacher is {self.teacher}, student "
                f"{self.student}: leave them out, or pass --loss.critic.kind dot"
            )
        if not 0 < self.min_temperature <= self.temperature:
            raise UserError(
                f"loss.critic.temperature is {self.temperature} and min_temperature {self.min_temperature}; "
                "0 < min_temperature <= temperature is needed"
            )
