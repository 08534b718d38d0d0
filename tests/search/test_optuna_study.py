"""The algorithm: asynchronous halving against a slow reference, replays, grids, and halving inside a pack."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import tiny_config

from mimkd_ray.config import Config, SearchConfig
from mimkd_ray.errors import UserError
from mimkd_ray.search.optuna_study import Study, halving, is_rung
from mimkd_ray.search.suggest import Suggest
from mimkd_ray.search.trials import Point, Trial
from mimkd_ray.seeds import SEEDS


def config(**changes: Any) -> SearchConfig:
    return SearchConfig(**({"space": ("temperature",)} | changes))


def build(suggest: Suggest) -> Config:
    lr = suggest.number("lr", 0.01, 1.0, log=True)
    if suggest.choice("clip", (True, False)):
        suggest.number("norm", 1.0, 5.0)
    return replace(tiny_config(), optim=replace(tiny_config().optim, lr=lr))


def point(epoch: int, top1: float) -> Point:
    return Point(epoch=epoch, step=epoch, top1=top1, top5=top1, cross_entropy=1.0)


def behind(value: float, rung_values: list[float], reduction: int) -> bool:
    """Asynchronous successive halving, by its paper: go on if among the best 1/reduction of those that reached the rung
    so far (the trial itself among them); at least the best one goes on."""
    ranked = sorted(rung_values, reverse=True)
    return value < ranked[max(1, len(ranked) // reduction) - 1]


@pytest.mark.parametrize("reduction", [2, 3])
def test_asha_stops_whom_the_paper_stops(reduction: int) -> None:
    study = Study(config(grace=1, reduction=reduction, algorithm="random"), build, [])
    rungs: dict[int, list[float]] = {}
    draw = random.Random(0)
    stopped = 0
    for number in range(30):
        study.ask(number)
        level = draw.random()
        for epoch in range(1, 10):
            value = level * epoch + draw.random()
            stop = study.report(number, epoch, value)
            expected = False
            if epoch in (1, reduction, reduction**2, reduction**3):
                rungs.setdefault(epoch, []).append(value)
                expected = behind(value, rungs[epoch], reduction)
            assert stop == expected, (number, epoch)
            if stop:
                stopped += 1
                break
        study.tell(number, "stopped" if stop else "completed", value)
    assert 10 < stopped < 30


def test_no_scheduler_stops_nobody() -> None:
    study = Study(config(scheduler="none"), build, [])
    for number in range(4):
        study.ask(number)
        assert not any(study.report(number, epoch, -number) for epoch in (1, 2, 3))


def test_less_can_be_better() -> None:
    study = Study(config(metric="cross_entropy"), build, [])
    for number, value in enumerate((1.0, 2.0)):
        study.ask(number)
        assert study.report(number, 1, value) == (value == 2.0)


def test_a_replayed_study_decides_as_the_one_that_went_on() -> None:
    """Restarted after five trials (one of them unfinished): the same rungs, the same verdicts."""
    own = config(algorithm="random", reduction=2)
    straight, trials = Study(own, build, []), []
    for number in range(5):
        asked = straight.ask(number)
        assert asked is not None
        curve = []
        for epoch in (1, 2, 3):
            curve.append(point(epoch, 10.0 * ((number * 7) % 5) + epoch))
            if straight.report(number, epoch, curve[-1].top1) or (number == 4 and epoch == 1):
                break
        state = "running" if number == 4 else "completed" if len(curve) == 3 else "stopped"
        if state != "running":
            straight.tell(number, state, curve[-1].top1)
        trials.append(
            Trial(number=number, state=state, params=asked.params, score=curve[-1].top1, curve=tuple(curve))  # type: ignore[arg-type]
        )
    again = Study(own, build, trials)
    for number, value in ((4, 12.0), (5, 33.0), (6, 1.0), (7, 21.0)):
        if number > 4:
            straight.ask(number)
            again.ask(number)
        for epoch in (1, 2) if number > 4 else (2,):
            assert straight.report(number, epoch, value + epoch) == again.report(number, epoch, value + epoch)


def test_a_space_that_was_changed_is_refused() -> None:
    known = [Trial(number=0, state="completed", params={"lr": 0.1, "clip": True, "norm": 2.0}, score=1.0)]
    Study(config(), build, known)

    def other(suggest: Suggest) -> Config:
        suggest.number("lr", 0.01, 1.0, log=True)
        return tiny_config()

    with pytest.raises(UserError, match=r"trial 0 of an earlier start has .*norm.*give the search another --run.name"):
        Study(config(), other, known)


def test_a_grid_ends_and_goes_on_where_it_was() -> None:
    own = config(algorithm="grid", points=2)
    study, params = Study(own, build, []), []
    while (asked := study.ask(len(params))) is not None:
        params.append(asked.params)
    assert len(params) == 2 * (2 + 1)
    assert len({tuple(sorted(each.items())) for each in params}) == len(params)
    known = [Trial(number=n, state="completed", params=each, score=1.0) for n, each in enumerate(params[:4])]
    again = Study(own, build, known)
    rest = [again.ask(4), again.ask(5), again.ask(6)]
    assert [each and each.params for each in rest] == [*params[4:], None]


def test_tpe_learns() -> None:
    """Sixty trials on a known function: the later third loses less than half of what uniform draws lose on average."""

    def parabola(suggest: Suggest) -> Config:
        suggest.number("x", 0.0, 1.0)
        return Config()

    study = Study(config(algorithm="tpe", scheduler="none", seed=3), parabola, [])
    values = []
    for number in range(60):
        asked = study.ask(number)
        assert asked is not None
        values.append(-((float(asked.params["x"]) - 0.3) ** 2))
        study.report(number, 1, values[-1])
        study.tell(number, "completed", values[-1])
    uniform = -(0.3**3 + 0.7**3) / 3  # the integral of -(x - 0.3)^2 over [0, 1]
    assert sum(values[40:]) / 20 > uniform / 2


def test_a_failed_trial_teaches_nothing_and_breaks_nothing() -> None:
    study = Study(config(), build, [])
    for number in range(12):
        study.ask(number)
        study.tell(number, "failed", None)
    assert study.ask(12) is not None


@given(
    values=st.dictionaries(st.integers(0, 40), st.floats(0, 100), min_size=1, max_size=16),
    reduction=st.integers(2, 4),
    epoch=st.integers(1, 30),
)
def test_halving_in_a_pack_keeps_the_best(values: dict[int, float], reduction: int, epoch: int) -> None:
    own = config(reduction=reduction, grace=2)
    stopped = halving(own, epoch, values)
    if epoch not in (2, 2 * reduction, 2 * reduction**2, 2 * reduction**3, 2 * reduction**4):
        assert not stopped
        return
    kept = set(values) - stopped
    assert len(kept) == -(-len(values) // reduction)
    assert min(values[number] for number in kept) >= max((values[number] for number in stopped), default=0)


def test_rungs() -> None:
    assert [epoch for epoch in range(1, 40) if is_rung(config(grace=2, reduction=3), epoch)] == [2, 6, 18]
    assert halving(config(scheduler="none"), 1, {0: 1.0, 1: 2.0}) == set()


def test_any_64_bit_seed_searches_and_each_start_draws_otherwise() -> None:
    """RandomState takes 32 bits. Neighbouring seeds and starts share no draw."""
    trial = Trial(number=0, state="completed", params={"lr": 0.1, "clip": False}, score=1.0)
    for algorithm in ("random", "tpe"):
        firsts = []
        for seed in (0, 1, 4_256_696, 2**32, 2**63, SEEDS - 1):
            for known in ([], [trial]):
                asked = Study(config(algorithm=algorithm, seed=seed), build, known).ask(len(known))
                again = Study(config(algorithm=algorithm, seed=seed), build, known).ask(len(known))
                assert asked is not None
                assert again is not None
                assert asked.params == again.params
                firsts.append(asked.params["lr"])
        assert len(set(firsts)) == len(firsts) == 12


@pytest.mark.parametrize("seed", [-1, SEEDS])
def test_a_seed_that_is_no_64_bit_number_is_refused(seed: int) -> None:
    with pytest.raises(UserError, match=rf"search\.seed is {seed}"):
        config(seed=seed)
