"""Named search spaces: the names that `jobs/search.py --search.space NAME ...` accepts.

Spaces are evaluated in the order of `SPACES`, so that later ones depend on the choices of earlier ones: the temperature
is chosen only if the critic has one, and the weight of a kind of term only if the kind is on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from mimkd_ray.config import Config
from mimkd_ray.config.critic import StudentSide, TeacherSide
from mimkd_ray.config.loss_presets import Negatives, SameClass
from mimkd_ray.errors import UserError, nearest
from mimkd_ray.losses.bounds import BOUNDS
from mimkd_ray.search.suggest import Candidates, Space, Suggest
from mimkd_ray.train.networks.build import KINDS
from mimkd_ray.user_functions import named_function


def _loss(config: Config, **changes: Any) -> Config:
    return replace(config, loss=replace(config.loss, **changes))


def critic(trial: Suggest, config: Config, pairs: Candidates) -> Config:
    """Choose the critic's kind, the layers of its sides, and their width."""
    kinds: tuple[Literal["dot", "concat"], ...] = ("dot", "concat")
    kind = trial.suggest_categorical("critic.kind", kinds)
    own = replace(config.loss.critic, kind=kind, teacher=None, student=None)
    if kind == "dot":
        teachers: tuple[TeacherSide, ...] = ("frozen", "linear", "mlp")
        students: tuple[StudentSide, ...] = ("linear", "mlp")
        own = replace(own, teacher=trial.suggest_categorical("critic.teacher", teachers))
        own = replace(own, student=trial.suggest_categorical("critic.student", students))
    if kind == "concat" or own.teacher != "frozen" or own.student == "mlp":
        own = replace(own, width=trial.suggest_categorical("critic.width", (32, 64, 128, 256)))
    return _loss(config, critic=own)


def temperature(trial: Suggest, config: Config, pairs: Candidates) -> Config:
    """Choose the dot critic's temperature, 0.02 to 1, fixed or as the initial value of a learned one."""
    own = config.loss.critic
    if own.kind != "dot":
        return config
    learn = trial.suggest_categorical("critic.learn_temperature", (True, False))
    value = trial.suggest_float("critic.temperature", 0.02, 1.0, log=True)
    lowest = min(own.min_temperature, value)
    return _loss(config, critic=replace(own, temperature=value, learn_temperature=learn, min_temperature=lowest))


def bound(trial: Suggest, config: Config, pairs: Candidates) -> Config:
    """Choose the bound on mutual information, and the source of its negatives: lane, earlier steps, step or cache."""
    options: list[Negatives] = ["all", "rolled", "queue"]
    if config.cache.reads:
        options.append("cache")
    elif config.train.lanes > 1:
        options.append("step")
    name = trial.suggest_categorical("bound", tuple(BOUNDS))
    return _loss(config, bound=name, negatives=trial.suggest_categorical("negatives", options))


def taps(trial: Suggest, config: Config, pairs: Candidates) -> Config:
    """Choose any subset of the candidate pairs of the feature terms, and the map of the local term."""
    chosen = tuple(pair for pair in pairs.feature if trial.suggest_categorical(f"feature {pair}", (True, False)))
    config = _loss(config, feature_pairs=chosen) if chosen else _loss(config, feature_weight=0.0)
    if config.loss.weight("local") and len(pairs.local) > 1:
        config = _loss(config, local_pairs=(trial.suggest_categorical("local", pairs.local),))
    return config


def kd(trial: Suggest, config: Config, pairs: Candidates) -> Config:
    """Choose Hinton's KD beside the terms, with weight 0.03 to 3 (standardised to 30: published with 9) and a
    temperature, or none."""
    if not trial.suggest_categorical("kd", (True, False)):
        return _loss(config, kd_weight=0.0)
    most = 30.0 if config.loss.kd_logits == "standardised" else 3.0
    weight = trial.suggest_float("kd_weight", 0.03, most, log=True)
    return _loss(config, kd_weight=weight, kd_temperature=trial.suggest_float("kd_temperature", 1.0, 8.0, log=True))


def negatives(trial: Suggest, config: Config, pairs: Candidates) -> Config:
    """Choose the negatives that count: those of the same class, only hard ones, those at other locations."""
    same: tuple[SameClass, ...] = ("keep", "leave_out")
    where: tuple[Literal["same", "all"], ...] = ("same", "all")
    config = _loss(config, same_class=trial.suggest_categorical("same_class", same))
    if config.loss.resolved_negatives == "rolled":
        return config
    if config.loss.weight("feature"):
        config = _loss(config, feature_negatives=trial.suggest_categorical("feature_negatives", where))
    if config.loss.critic.kind == "dot":
        config = _loss(config, hard_share=trial.suggest_categorical("hard_share", (1.0, 0.5, 0.25, 0.1)))
    return config


def target(trial: Suggest, config: Config, pairs: Candidates) -> Config:
    """Choose InfoNCE's target: the positive or the teacher's similarities (temperature 0.05 to 0.5), in one or both
    directions."""
    own = config.loss
    if own.resolved_bound != "infonce" or own.resolved_negatives == "rolled":
        return config
    config = _loss(config, symmetric=trial.suggest_categorical("symmetric", (False, True)))
    if own.critic.kind == "dot" and trial.suggest_categorical("soft targets", (False, True)):
        config = _loss(config, soft_temperature=trial.suggest_float("soft_temperature", 0.05, 0.5, log=True))
    return config


def weights(trial: Suggest, config: Config, pairs: Candidates) -> Config:
    """Choose the weight of each kind of term, 0.01 to 30, or none. Feature terms are off if no pair was chosen.

    The last kind is on if nothing else reads the teacher: a student alone would give a search no information.
    """
    kinds = [kind for kind in KINDS if config.loss.weight(kind)]
    config = _loss(config, **dict.fromkeys((f"{kind}_weight" for kind in kinds), 0.0))
    for kind in kinds:
        needed = kind == kinds[-1] and not config.loss.uses_teacher
        if needed or trial.suggest_categorical(f"{kind} terms", (True, False)):
            name = f"{kind}_weight"
            config = _loss(config, **{name: trial.suggest_float(name, 0.01, 30.0, log=True)})
    return config


def rival(trial: Suggest, config: Config, pairs: Candidates) -> Config:
    """Choose the factor on the published weights of the rivals in `loss.name`, 0.1 to 10."""
    if not config.loss.rivals and "kd" not in config.loss.name:
        return config
    return _loss(config, rival_weight=trial.suggest_float("rival_weight", 0.1, 10.0, log=True))


def rate(trial: Suggest, config: Config, pairs: Candidates) -> Config:
    """Choose the learning rate, from a quarter to four times the recipe's."""
    lr = config.optim.lr
    return replace(config, optim=replace(config.optim, lr=trial.suggest_float("lr", lr / 4, lr * 4, log=True)))


SPACES: dict[str, Space] = {
    "critic": critic,
    "temperature": temperature,
    "bound": bound,
    "taps": taps,
    "negatives": negatives,
    "target": target,
    "kd": kd,
    "weights": weights,
    "rival": rival,
    "rate": rate,
}


def find_spaces(names: Sequence[str]) -> list[Space]:
    """Return the spaces of these names; "package.module:function" is imported. Those of SPACES come first, in its
    order. Raises UserError for a name that is neither."""
    found = []
    for name in names:
        if ":" in name:
            found.append(named_function("search.space", name))
        elif name not in SPACES:
            raise UserError(f"search.space {name!r} is unknown{nearest(name, SPACES)} (spaces: {', '.join(SPACES)})")
    return [SPACES[name] for name in SPACES if name in names] + found
