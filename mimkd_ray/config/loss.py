"""Section `loss`: the kinds of term, their weights, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from mimkd_ray.config.critic import CriticConfig
from mimkd_ray.config.form.values import FROM_0, FROM_1, check_values
from mimkd_ray.config.loss_presets import PRESETS, BoundName, Kind, Negatives, PresetName, SameClass
from mimkd_ray.errors import UserError
from mimkd_ray.losses.methods.registry import KD_CE_WEIGHT, RIVALS, Method


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Kinds of term, their weights, and the choice of negatives. Unset fields take the preset's value
    (loss_presets.py)."""

    name: tuple[Method, ...] = ("mimkd",)
    """Methods whose losses are added to the cross-entropy: mimkd, or a rival with its published formula and weight, or
    several. None: cross-entropy only, and KD if kd_weight is set. Without mimkd, the weights of the mutual-information
    terms have no effect."""
    rival_weight: float = 1.0
    """Factor on the published weights of the rivals in `name`."""
    rival_pairs: tuple[str, ...] = ()
    """Tap pairs "teacher:student" of all rivals that read maps, from shallow to deep; unset: as many stages as the
    rival reads, paired from the deepest up."""
    rival_warmup: float = 20.0
    """Epochs over which dkd and review rise to their full weights: 20 on CIFAR-100, 1 on ImageNet, as published; 0: no
    warm-up. Other losses have full weight from the start."""
    dkd_beta: float = 8.0
    """Weight of DKD's second part, over all classes except the label's. Published per pair of networks: 2 to 8 on
    CIFAR-100, 0.5 and 2 on ImageNet."""
    dkd_temperature: float = 4.0
    """Temperature of dkd; published: 4 on CIFAR-100, 1 on ImageNet."""
    dist_temperature: float = 4.0
    """Temperature of dist; published: 4 on CIFAR-100, 1 on ImageNet."""
    preset: PresetName = "accuracy"
    """accuracy: best without the teacher's logits; frozen teacher side, queue. best: accuracy with Hinton's KD. paper:
    Jensen-Shannon with one rolled negative, learned critics on both sides. two_sided: InfoNCE over the lane with such
    critics, the default of release 0.1."""
    bound: BoundName | None = None
    """Lower bound on mutual information; unset: the preset's."""
    negatives: Negatives | None = None
    """all: every other image of the lane. rolled: the previous image, and with mixing the one before it. The others
    apply to terms of teacher vectors: queue: the lane's, and teacher vectors of earlier steps. step: every other image
    of the whole step (teacher vectors are gathered from all workers). cache: the lane's, and cache.negatives random
    training images from the cache. Unset: the preset's."""
    queue: int = 16_384
    """Teacher vectors of earlier steps that `negatives` queue keeps on each worker and in checkpoints, up to 64 MiB. A
    local term of L locations uses 1/L of them and so costs as much as a global term."""
    same_class: SameClass | None = None
    """keep: images of one class are negatives of each other. leave_out: they are not, if classes are known (with mixing
    they are not). Held-out mutual information always counts them as negatives. Unset: the preset's."""
    hard_share: float = 1.0
    """Share of the negatives that is used: for each image, those whose teacher features are most similar to its own."""
    feature_negatives: Literal["same", "all"] = "same"
    """Negatives of a feature term: the other images at the same location, or at all locations."""
    soft_temperature: float = 0.0
    """Temperature of the teacher's own similarities, which are then the target over the candidates; 0: the positive
    alone is the target. Only for InfoNCE with a dot critic."""
    symmetric: bool = False
    """Average InfoNCE with its opposite direction, in which a teacher's feature picks its student among the lane's."""
    locations: int | None = None
    """Most locations of a map that a step scores, on an even grid that moves at every step; 0: always all. Unset: the
    preset's. Held-out mutual information uses all of them."""
    score_memory_mb: int = 0
    """Memory in MiB for the scores of a term at a time; more are computed in chunks, and again in the backward pass. 0:
    256 on a GPU, on a CPU 4, or a quarter of the embeddings' if that is more."""
    global_weight: float | None = None
    """Weight of each global term (teacher vector, student vector); 0 turns the kind off. Unset: the preset's."""
    local_weight: float | None = None
    """Weight of each local term (teacher vector, every location of a student map). Unset: the preset's."""
    feature_weight: float | None = None
    """Weight of each feature term (teacher map, student map, location by location). Unset: the preset's."""
    pair_weights: Literal["each", "shared"] = "each"
    """each: every pair of taps has its kind's weight. shared: a kind's weight is divided by its number of pairs."""
    schedule: Literal["constant", "warmup", "rise", "fall"] = "constant"
    """The terms' weights over training. warmup: linear from 0 over the first tenth. rise, fall: a half cosine, from 0
    or to 0."""
    taps: Literal["after", "before"] = "after"
    """Read automatically chosen stages after their last activation, or before it if it is a module of its own."""
    max_side: int = 14
    """Largest height and width of automatically chosen student maps; a map of twice the side costs four times as much.
    Where all are larger, the deepest is taken."""
    global_pairs: tuple[str, ...] = ()
    """Tap pairs "teacher:student" or "teacher:student:weight" (multiplies the kind's weight) of the global terms;
    unset: automatic. The tap "logits" is the network's logits."""
    local_pairs: tuple[str, ...] = ()
    """Tap pairs of the local terms: a teacher vector with a student map; unset: the deepest map."""
    feature_pairs: tuple[str, ...] = ()
    """Tap pairs of the feature terms, map with map; unset: the deepest stages of at most max_side. PATH@input is a
    layer's input."""
    ce_weight: float | None = None
    """Weight of the cross-entropy with the labels. Unset: the preset's for mimkd, else 1. If `name` is kd alone, it is
    multiplied by 0.1: Hinton's KD is published as 0.1 cross-entropy + 0.9 KD."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy."""
    kd_weight: float | None = None
    """Weight of Hinton's KD on the logits, in addition to `name`; kd in `name` adds its own 0.9. Unset: the preset's
    for mimkd, else 0."""
    kd_temperature: float = 4.0
    """Temperature of Hinton's KD."""
    kd_logits: Literal["raw", "standardised"] = "raw"
    """Logits that Hinton's KD compares. standardised: those of each image with mean 0 and standard deviation 1
    (arXiv 2403.01427, published with weight 9 and temperature 2); of two classes only their order is then left."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The critic of every term (each pair has its own weights)."""

    def __post_init__(self) -> None:
        weights = ("global_weight", "local_weight", "feature_weight", "ce_weight", "kd_weight", "rival_weight")
        others = ("dkd_beta", "rival_warmup", "soft_temperature", "locations", "score_memory_mb")
        limits = dict.fromkeys((*weights, *others), FROM_0)
        check_values(self, "loss", queue=FROM_1, max_side=FROM_1, **limits)
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"loss.label_smoothing is {self.label_smoothing}; it must lie in [0, 1)")
        for name in ("kd_temperature", "dkd_temperature", "dist_temperature"):
            if not getattr(self, name) > 0:
                raise UserError(f"loss.{name} is {getattr(self, name)}; it must be positive")
        if not 0 < self.hard_share <= 1:
            raise UserError(f"loss.hard_share is {self.hard_share}; it must lie in (0, 1]")
        self._check_objective()
        for kind in ("global", "local", "feature"):
            unset = getattr(self, f"{kind}_weight") is None and "mimkd" in self.name
            if unset and getattr(self, f"{kind}_pairs") and not self.weight(kind):
                raise UserError(
                    f"loss.{kind}_pairs names pairs, and preset {self.preset} gives {kind} terms no weight: pass "
                    f"--loss.{kind}-weight too"
                )
        if len(set(self.name)) != len(self.name):
            raise UserError(f"loss.name is {' '.join(self.name)}: name each method once; weights make it stronger")

    def _check_objective(self) -> None:
        """Raise UserError for options that need another bound, critic or choice of negatives."""
        asked = {
            "soft_temperature": bool(self.soft_temperature),
            "symmetric": self.symmetric,
            "hard_share": self.hard_share < 1,
        }
        on = [f"loss.{name}" for name, is_on in asked.items() if is_on]
        if on and self.resolved_negatives == "rolled":
            raise UserError(
                f"{on[0]} chooses among many negatives, and loss.negatives is rolled: pass --loss.negatives all"
            )
        if (self.soft_temperature or self.symmetric) and self.resolved_bound != "infonce":
            raise UserError(
                f"{on[0]} is a form of InfoNCE, and loss.bound is {self.resolved_bound}: pass --loss.bound infonce"
            )
        if (self.soft_temperature or self.hard_share < 1) and self.critic.kind != "dot":
            raise UserError(f"{on[0]} reads the teacher's cosines, which the {self.critic.kind} critic has none of")
        of_logits = self._pairs_of_logits()
        if of_logits and self.resolved_negatives in ("step", "cache"):
            raise UserError(
                f"loss.negatives is {self.resolved_negatives}, which has vectors of layers alone, and "
                f"{of_logits[0]} reads the teacher's logits: pass --loss.negatives queue or all"
            )
        if self.feature_negatives == "all" and self.resolved_negatives == "rolled":
            raise UserError("loss.feature_negatives is all, and loss.negatives is rolled: pass --loss.negatives all")

    @property
    def resolved_bound(self) -> BoundName:
        """The bound that is in effect."""
        return self.bound or PRESETS[self.preset].bound

    @property
    def resolved_same_class(self) -> SameClass:
        """The treatment of images of the same class that is in effect."""
        return self.same_class or PRESETS[self.preset].same_class

    @property
    def resolved_critic(self) -> CriticConfig:
        """The critic that is in effect."""
        own, preset = self.critic, PRESETS[self.preset]
        if own.learn_temperature is None:
            own = replace(own, learn_temperature=preset.learn_temperature)
        if own.kind == "concat":
            return own
        return replace(own, teacher=own.teacher or preset.teacher, student=own.student or preset.student)

    @property
    def resolved_negatives(self) -> Negatives:
        """The negatives that are in effect."""
        return self.negatives or PRESETS[self.preset].negatives

    @property
    def resolved_locations(self) -> int:
        """The most locations of a map that a step scores, as in effect; 0: all."""
        return PRESETS[self.preset].locations if self.locations is None else self.locations

    @property
    def resolved_ce_weight(self) -> float:
        """The weight of the cross-entropy that is in effect."""
        weight = self.ce_weight
        if weight is None:
            weight = PRESETS[self.preset].ce_weight if "mimkd" in self.name else 1.0
        return weight * (KD_CE_WEIGHT if self.name == ("kd",) else 1.0)

    @property
    def resolved_kd_weight(self) -> float:
        """The weight of Hinton's KD that is in effect."""
        weight = self.kd_weight
        if weight is None:
            weight = PRESETS[self.preset].kd_weight if "mimkd" in self.name else 0.0
        return weight + (self.weight_of("kd") if "kd" in self.name else 0.0)

    @property
    def rivals(self) -> tuple[Method, ...]:
        """The active methods with a loss of their own: neither MIMKD nor KD."""
        return tuple(method for method in RIVALS if method in self.name and method != "kd" and self.rival_weight > 0)

    def weight_of(self, rival: Method) -> float:
        """Return the weight of a rival."""
        return self.rival_weight * RIVALS[rival].weight

    def weight(self, kind: Kind) -> float:
        """Return the weight of one kind of mutual-information term."""
        if "mimkd" not in self.name:
            return 0.0
        own = {"global": self.global_weight, "local": self.local_weight, "feature": self.feature_weight}[kind]
        return PRESETS[self.preset].weights[kind] if own is None else own

    @property
    def uses_features(self) -> bool:
        """True if any mutual-information term is on."""
        return self.weight("global") + self.weight("local") + self.weight("feature") > 0

    @property
    def uses_logits(self) -> bool:
        """True if any term reads the teacher's logits."""
        return (
            self.resolved_kd_weight > 0
            or any(RIVALS[rival].logits for rival in self.rivals)
            or bool(self._pairs_of_logits())
        )

    def _pairs_of_logits(self) -> list[str]:
        """The configured pairs whose terms read the teacher's logits."""
        terms = (*self.global_pairs, *self.local_pairs) if self.uses_features else ()
        return [pair for pair in terms if pair.startswith("logits:")]

    @property
    def uses_teacher(self) -> bool:
        """True if any term needs the teacher."""
        return self.uses_features or self.uses_logits or bool(self.rivals)
