"""Optuna's part: define-by-run spaces, grids, samplers, the members of a pack, and halving inside it."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_search import tiny_configs

from mimkd_ray.config import Config, SearchConfig
from mimkd_ray.errors import UserError
from mimkd_ray.search.configs import TrialConfigs
from mimkd_ray.search.optuna_study import combinations, draw_pack, halving, has_rung, sampler
from mimkd_ray.search.suggest import Candidates, Suggest
from mimkd_ray.search.trials import Trial
from mimkd_ray.seeds import SEEDS


def config(**changes: Any) -> SearchConfig:
    return SearchConfig(**({"space": ("temperature",)} | changes))


def parabola(trial: Suggest, base: Config, pairs: Candidates) -> Config:
    """A space with a known best value."""
    trial.suggest_float("x", 0.0, 1.0)
    return base


def branches(trial: Suggest, base: Config, pairs: Candidates) -> Config:
    """A space with a condition."""
    if trial.suggest_categorical("clip", (True, False)):
        trial.suggest_float("norm", 1.0, 5.0)
    return replace(base, optim=replace(base.optim, lr=trial.suggest_float("lr", 0.01, 1.0, log=True)))


def searched(folder: Path, space: Any) -> TrialConfigs:
    """Configs of a space of this file."""
    found = tiny_configs(folder)
    found.spaces = (space,)
    return found


def test_what_optuna_is_asked_for_is_what_a_trial_takes(tmp_path: Path) -> None:
    configs = searched(tmp_path, branches)
    ask = pickle.loads(pickle.dumps(configs.ask))  # noqa: S301
    study = optuna.create_study(sampler=sampler(config(algorithm="random")))
    kinds = set()
    for _ in range(8):
        trial = study.ask()
        ask(trial)
        assert configs(trial.params).params == trial.params
        kinds.add(tuple(sorted(trial.params)))
    assert kinds == {("clip", "lr"), ("clip", "lr", "norm")}


def test_a_grid_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    configs = searched(tmp_path, branches)
    own = config(algorithm="grid", points=2, trials=0, hours=1.0)
    found = combinations(own, configs)
    assert len(found) == 2 * (2 + 1)
    assert len({tuple(sorted(each.items())) for each in found}) == len(found)
    assert combinations(replace(own, trials=6), configs) == found
    assert capsys.readouterr().out == ""
    assert combinations(replace(own, trials=4), configs) == found[:4]
    assert "the grid has more than 4 combinations, of which the first are tried" in capsys.readouterr().out
    monkeypatch.setattr("mimkd_ray.search.optuna_study.MOST_COMBINATIONS", 5)
    with pytest.raises(UserError, match=r"more than 5 combinations, .* give --search.trials"):
        combinations(own, configs)
    study = optuna.create_study(sampler=sampler(own))
    for each in found:
        study.enqueue_trial(each)
        trial = study.ask()
        configs.ask(trial)
        assert trial.params == each
    packs = [draw_pack(replace(own, pack=2), configs, pack, [], found[:5]) for pack in range(3)]
    assert packs == [found[:2], found[2:4], found[4:5]]


def test_packs_learn_from_packs(tmp_path: Path) -> None:
    """Members after thirty trials on a known function lose less than half of what uniform draws lose on average."""
    configs = searched(tmp_path, parabola)
    own = config(algorithm="tpe", scheduler="none", seed=3, trials=46, pack=16)
    known: list[Trial] = []
    for pack in (0, 1):
        for params in draw_pack(own, configs, pack, known):
            score = -((params["x"] - 0.3) ** 2)
            known.append(Trial(number=len(known), state="completed", params=params, score=score))
    known.append(Trial(number=32, state="failed", params={"x": 0.3}))
    known.append(Trial(number=33, state="running", params={"x": 0.3}))
    values = [-((params["x"] - 0.3) ** 2) for params in draw_pack(own, configs, 2, known)]
    uniform = -(0.3**3 + 0.7**3) / 3  # the integral of -(x - 0.3)^2 over [0, 1]
    assert len(values) == 14, "what is left"
    assert sum(values) / len(values) > uniform / 2
    assert draw_pack(own, configs, 0, []) == [trial.params for trial in known[:16]], "the same pack, drawn again"


@given(
    values=st.dictionaries(st.integers(0, 40), st.floats(0, 100), min_size=1, max_size=16),
    reduction=st.integers(2, 4),
    epoch=st.integers(1, 30),
)
def test_halving_in_a_pack_keeps_the_best(values: dict[int, float], reduction: int, epoch: int) -> None:
    own = config(reduction=reduction, grace=2)
    stopped = halving(own, epoch - 1, epoch, values)
    if epoch not in (2, 2 * reduction, 2 * reduction**2, 2 * reduction**3, 2 * reduction**4):
        assert not stopped
        return
    kept = set(values) - stopped
    assert len(kept) == -(-len(values) // reduction)
    assert min(values[number] for number in kept) >= max((values[number] for number in stopped), default=0)


def test_rungs() -> None:
    own = config(grace=2, reduction=3)
    assert [epoch for epoch in range(1, 40) if has_rung(own, epoch - 1, epoch)] == [2, 6, 18]
    assert [epoch for epoch in range(5, 40, 5) if has_rung(own, epoch - 5, epoch)] == [5, 10, 20]
    assert halving(config(scheduler="none"), 0, 1, {0: 1.0, 1: 2.0}) == set()


def test_any_64_bit_seed_searches_and_each_pack_draws_otherwise(tmp_path: Path) -> None:
    """RandomState takes 32 bits. Neighbouring seeds and packs share no draw."""
    configs = searched(tmp_path, parabola)
    for algorithm in ("random", "tpe"):
        own = [config(algorithm=algorithm, seed=seed, pack=2) for seed in (0, 1, 4_256_696, 2**32, 2**63, SEEDS - 1)]
        firsts = [draw_pack(each, configs, pack, [])[0]["x"] for each in own for pack in (0, 1)]
        assert len(set(firsts)) == len(firsts) == 12


@pytest.mark.parametrize("seed", [-1, SEEDS])
def test_a_seed_that_is_no_64_bit_number_is_refused(seed: int) -> None:
    with pytest.raises(UserError, match=rf"search\.seed is {seed}"):
        config(seed=seed)
