"""What a student minimises: the kinds of term, their weights, and what they read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from mimkd_ray.errors import UserError
from mimkd_ray.losses.bounds import BoundName
from mimkd_ray.losses.critics import CriticConfig
from mimkd_ray.losses.methods import KD_CE_WEIGHT, RIVALS, Method

Negatives = Literal["all", "rolled", "step", "cache"]
Kind = Literal["global", "local", "feature"]


class Preset(NamedTuple):
    """What a preset stands for where the config says nothing else."""

    bound: BoundName
    negatives: Negatives
    locations: int


PRESETS = {"accuracy": Preset("infonce", "all", 64), "paper": Preset("jsd", "rolled", 0)}


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights and kinds of the terms. The default of every weight is the starting value of the `accuracy` preset."""

    name: tuple[Method, ...] = ("mimkd",)
    """Methods whose losses are added to the cross-entropy: mimkd, or a rival by its published formula and weight, or
    several. None: cross-entropy alone, and KD where kd_weight is set. Without mimkd no mutual-information term is on,
    whatever the weights of its terms."""
    rival_weight: float = 1.0
    """Factor on the published weights of the rivals in `name`."""
    rival_pairs: tuple[str, ...] = ()
    """Tap pairs "teacher:student" of all rivals that read maps, from shallow to deep; unset: stages, deepest with
    deepest, as many as the rival reads."""
    rival_warmup: float = 20.0
    """Epochs over which dkd and review rise to their weights, as published; 0: at once. Other losses have full weight
    from the start."""
    preset: Literal["accuracy", "paper"] = "accuracy"
    """accuracy: InfoNCE over all pairs of the lane. paper: Jensen-Shannon with one rolled negative. Each has its own
    `locations` besides."""
    bound: BoundName | None = None
    """Lower bound on mutual information; unset: the preset's."""
    negatives: Negatives | None = None
    """all: every other image of the lane. rolled: the one before. step: for global and local terms every other image
    of the whole step (teacher vectors are gathered from all workers). cache: for those terms the others of the lane,
    and cache.negatives random images of the training set, whose vectors come from the cache. Unset: the preset's."""
    locations: int | None = None
    """Of a map with more locations, as many are scored in a step, on an even grid that is elsewhere at every step; 0:
    always all. Unset: the preset's, 64 or 0. Mutual information is read over all of them."""
    global_weight: float = 0.1
    """Weight of each global term (teacher vector, student vector). 0 turns the kind off."""
    local_weight: float = 0.1
    """Weight of each local term (teacher vector, every location of a student map)."""
    feature_weight: float = 1.0
    """Weight of each feature term (teacher map, student map, location by location)."""
    global_pairs: tuple[str, ...] = ()
    """Tap pairs "teacher:student" or "teacher:student:weight" (multiplies the kind's weight); unset: chosen."""
    local_pairs: tuple[str, ...] = ()
    """Tap pairs of the local terms: a teacher's vector with a student's map; unset: the deepest map."""
    feature_pairs: tuple[str, ...] = ()
    """Tap pairs of the feature terms, map with map; unset: the deepest stages of at most 14x14."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels. `name` kd, and nothing beside it, multiplies it by 0.1: Hinton's KD
    is published as 0.1 cross-entropy + 0.9 KD."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy."""
    kd_weight: float = 0.0
    """Weight of Hinton's KD on the logits, beside any `name`; kd in `name` adds its 0.9. KD and mutual information do
    not simply add: tune it on held-out data."""
    kd_temperature: float = 4.0
    """Temperature of Hinton's KD."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The critic of every term (each pair has its own weights)."""

    def __post_init__(self) -> None:
        for name in ("global_weight", "local_weight", "feature_weight", "ce_weight", "kd_weight", "rival_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"loss.{name} is {getattr(self, name)}; it must be finite and not negative")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"loss.label_smoothing is {self.label_smoothing}; it must lie in [0, 1)")
        if self.locations is not None and self.locations < 0:
            raise UserError(f"loss.locations is {self.locations}; it must be at least 1, or 0 for all")
        if self.kd_temperature <= 0:
            raise UserError(f"loss.kd_temperature is {self.kd_temperature}; it must be positive")
        if not 0 <= self.rival_warmup < float("inf"):
            raise UserError(f"loss.rival_warmup is {self.rival_warmup}; it must be finite and not negative")
        if len(set(self.name)) != len(self.name):
            raise UserError(f"loss.name is {' '.join(self.name)}: name each method once; weights make it stronger")

    @property
    def resolved_bound(self) -> BoundName:
        """The bound in force."""
        return self.bound or PRESETS[self.preset].bound

    @property
    def resolved_negatives(self) -> Negatives:
        """The negatives in force."""
        return self.negatives or PRESETS[self.preset].negatives

    @property
    def resolved_locations(self) -> int:
        """The most locations of a map that a step scores, in force; 0: all."""
        return PRESETS[self.preset].locations if self.locations is None else self.locations

    @property
    def resolved_ce_weight(self) -> float:
        """The weight of the cross-entropy in force."""
        return self.ce_weight * (KD_CE_WEIGHT if self.name == ("kd",) else 1.0)

    @property
    def resolved_kd_weight(self) -> float:
        """The weight of Hinton's KD in force."""
        return self.kd_weight + (self.weight_of("kd") if "kd" in self.name else 0.0)

    @property
    def rivals(self) -> tuple[Method, ...]:
        """The methods in force that are losses of their own: neither MIMKD nor KD."""
        return tuple(method for method in RIVALS if method in self.name and method != "kd" and self.rival_weight > 0)

    def weight_of(self, rival: Method) -> float:
        """The weight of a rival."""
        return self.rival_weight * RIVALS[rival].weight

    def weight(self, kind: Kind) -> float:
        """The weight of one kind of mutual-information term."""
        if "mimkd" not in self.name:
            return 0.0
        return {"global": self.global_weight, "local": self.local_weight, "feature": self.feature_weight}[kind]

    @property
    def uses_features(self) -> bool:
        """Whether any mutual-information term is on."""
        return self.weight("global") + self.weight("local") + self.weight("feature") > 0

    @property
    def uses_logits(self) -> bool:
        """Whether anything reads the teacher's logits."""
        return self.resolved_kd_weight > 0 or any(RIVALS[rival].logits for rival in self.rivals)

    @property
    def uses_teacher(self) -> bool:
        """Whether any term needs the teacher at all."""
        return self.uses_features or self.uses_logits or bool(self.rivals)
