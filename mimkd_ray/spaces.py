"""Named search spaces, beside the recipes: what `jobs/search.py --search.space NAME ...` may search.

They are asked in the order of `SPACES`, so that later ones see what earlier ones chose: the temperature is asked for
only where the critic has one, and the weight of a kind of term only where the kind is on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from mimkd_ray.losses.bounds import BOUNDS
from mimkd_ray.losses.config import Negatives
from mimkd_ray.search.space import Candidates, Space, Suggest
from mimkd_ray.train.build import KINDS
from mimkd_ray.train.config import Config


def _loss(config: Config, **changes: Any) -> Config:
    return replace(config, loss=replace(config.loss, **changes))


def critic(suggest: Suggest, config: Config, pairs: Candidates) -> Config:
    """The critic's kind and width."""
    kinds: tuple[Literal["dot", "concat"], ...] = ("dot", "concat")
    kind = suggest.choice("critic.kind", kinds)
    width = suggest.choice("critic.width", (32, 64, 128, 256))
    return _loss(config, critic=replace(config.loss.critic, kind=kind, width=width))


def temperature(suggest: Suggest, config: Config, pairs: Candidates) -> Config:
    """The dot critic's temperature, 0.02 to 1, fixed or as the start of a learned one."""
    own = config.loss.critic
    if own.kind != "dot":
        return config
    learn = suggest.choice("critic.learn_temperature", (True, False))
    value = suggest.number("critic.temperature", 0.02, 1.0, log=True)
    lowest = min(own.min_temperature, value)
    return _loss(config, critic=replace(own, temperature=value, learn_temperature=learn, min_temperature=lowest))


def bound(suggest: Suggest, config: Config, pairs: Candidates) -> Config:
    """The bound on mutual information, and its negatives: of the lane, of the step, or from the cache."""
    options: list[Negatives] = ["all", "rolled"]
    if config.cache.reads:
        options.append("cache")
    elif config.train.lanes > 1:
        options.append("step")
    name = suggest.choice("bound", tuple(BOUNDS))
    return _loss(config, bound=name, negatives=suggest.choice("negatives", options))


def taps(suggest: Suggest, config: Config, pairs: Candidates) -> Config:
    """Any subset of the candidate pairs of the feature terms; the map of the local term."""
    chosen = tuple(pair for pair in pairs.feature if suggest.choice(f"feature {pair}", (True, False)))
    config = _loss(config, feature_pairs=chosen) if chosen else _loss(config, feature_weight=0.0)
    if config.loss.weight("local") and len(pairs.local) > 1:
        config = _loss(config, local_pairs=(suggest.choice("local", pairs.local),))
    return config


def kd(suggest: Suggest, config: Config, pairs: Candidates) -> Config:
    """Hinton's KD beside the terms: its weight, 0.03 to 3, and temperature, or none."""
    if not suggest.choice("kd", (True, False)):
        return _loss(config, kd_weight=0.0)
    weight = suggest.number("kd_weight", 0.03, 3.0, log=True)
    return _loss(config, kd_weight=weight, kd_temperature=suggest.number("kd_temperature", 1.0, 8.0, log=True))


def weights(suggest: Suggest, config: Config, pairs: Candidates) -> Config:
    """The weight of each kind of term, 0.01 to 3, or none. Feature terms are off where no pair was chosen.

    The last kind is on where nothing else reads the teacher: a student alone would tell a search nothing new."""
    kinds = [kind for kind in KINDS if config.loss.weight(kind)]
    config = _loss(config, **dict.fromkeys((f"{kind}_weight" for kind in kinds), 0.0))
    for kind in kinds:
        needed = kind == kinds[-1] and not config.loss.uses_teacher
        if needed or suggest.choice(f"{kind} terms", (True, False)):
            name = f"{kind}_weight"
            config = _loss(config, **{name: suggest.number(name, 0.01, 3.0, log=True)})
    return config


def rival(suggest: Suggest, config: Config, pairs: Candidates) -> Config:
    """The factor on the published weights of the rivals in `loss.name`, 0.1 to 10."""
    if not config.loss.rivals and "kd" not in config.loss.name:
        return config
    return _loss(config, rival_weight=suggest.number("rival_weight", 0.1, 10.0, log=True))


def rate(suggest: Suggest, config: Config, pairs: Candidates) -> Config:
    """The learning rate, from a quarter to four times the recipe's."""
    lr = config.optim.lr
    return replace(config, optim=replace(config.optim, lr=suggest.number("lr", lr / 4, lr * 4, log=True)))


SPACES: dict[str, Space] = {
    "critic": critic,
    "temperature": temperature,
    "bound": bound,
    "taps": taps,
    "kd": kd,
    "weights": weights,
    "rival": rival,
    "rate": rate,
}
