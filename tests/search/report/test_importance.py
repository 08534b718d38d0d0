"""Importance of hyperparameters, against spaces whose shares of the variance are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import optuna
import pytest
from some_trials import trial

from mimkd_ray.search.report.importance import LEAST_TRIALS, importances
from mimkd_ray.search.trials import Trial


def factorial(score: Callable[[int, int], float], name: Callable[[int], Any] = float) -> list[Trial]:
    """Every combination of two parameters of two values, ten times."""
    cells = list(product((0, 1), (0, 1))) * 10
    return [
        trial(i, ("completed", "stopped")[i % 2], params={"a": name(a), "b": name(b)}, score=score(a, b))
        for i, (a, b) in enumerate(cells)
    ]


@pytest.mark.parametrize("name", [float, int, bool, lambda value: f"<b>{value}"])
@pytest.mark.parametrize(
    ("metric", "score"),
    [
        ("top1", lambda a, b: 50.0 + 2 * a + b),
        ("cross_entropy", lambda a, b: 2 * a + b),
        ("cross_entropy", lambda a, b: 10.0 ** (100 * a + b)),  # ranks: the size of the steps does not matter
    ],
)
def test_shares_of_the_variance(metric: str, score: Callable[[int, int], float], name: Callable[[int], Any]) -> None:
    # Ranks go as 2a + b up to sign and scale, whose variance over the square is 4/5 from a and 1/5 from b.
    found = importances(factorial(score, name), metric)
    assert [(item.name, item.trials, item.everywhere) for item in found] == [("a", 40, True), ("b", 40, True)]
    assert [item.share for item in found] == pytest.approx([0.8, 0.2], abs=1e-9)


def test_several_categories_weigh_alike() -> None:
    scores = {"dv": 0.0, "jsd": 3.0, "nce": 1.0, "smile": 2.0}
    cells = list(product(scores, (0, 1))) * 20
    trials = [
        trial(i, params={"bound": bound, "b": b}, score=50 + 2 * scores[bound] + b)
        for i, (bound, b) in enumerate(cells)
    ]
    # Eight ranks in equal steps: three bits of weights 4, 2 and 1, of which the category has two.
    assert {item.name: item.share for item in importances(trials, "top1")} == {
        "bound": pytest.approx(20 / 21, abs=1e-9),
        "b": pytest.approx(1 / 21, abs=1e-9),
    }


def test_a_conditional_parameter_is_judged_among_the_trials_that_have_it() -> None:
    trials = factorial(lambda a, b: 50.0 + 10 * a + b)
    with_c = [
        trial(100 + i, params={"a": 0.0, "b": float(b), "c": c}, score=40.0 + (c == "x") + 2 * b)
        for i, (b, c) in enumerate(list(product((0, 1), ("x", "y"))) * 10)
    ]
    found = {item.name: item for item in importances(trials + with_c, "top1")}
    assert (found["c"].trials, found["c"].everywhere) == (40, False)
    assert found["c"].share == pytest.approx(0.2, abs=1e-9)  # beside b with 0.8; a is constant among them
    assert (found["a"].trials, found["a"].everywhere) == (80, True)
    assert found["a"].share + found["b"].share == pytest.approx(1)


def test_failed_and_running_trials_and_scores_that_are_not_finite_do_not_enter() -> None:
    trials = factorial(lambda a, b: 50.0 + 2 * a + b)
    noise = [
        trial(100, "failed", params={"a": 0.0, "b": 7.0}, score=99.0),
        trial(101, "running", params={"a": 5.0, "b": 0.0}, score=99.0),
        trial(102, params={"a": 5.0, "b": 0.0}, score=math.nan),
        trial(103, params={"a": 5.0, "b": 0.0}),
    ]
    assert importances([*trials, *noise], "top1") == importances(trials, "top1")


def test_nothing_is_said_where_nothing_is_known() -> None:
    trials = factorial(lambda a, b: 50.0 + a + b)
    assert importances([], "top1") == []
    assert importances(trials[: LEAST_TRIALS - 1], "top1") == []
    assert importances(factorial(lambda a, b: 50.0), "top1") == []  # equal scores
    assert importances([trial(i, params={"a": 1.0}, score=float(i)) for i in range(20)], "top1") == []  # constant
    assert importances([trial(i, params={"a": math.inf}, score=float(i)) for i in range(20)], "top1") == []


def test_optunas_logging_is_left_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    before = optuna.logging.get_verbosity()
    assert importances(factorial(lambda a, b: 50.0 + a + b), "top1")
    assert optuna.logging.get_verbosity() == before
    assert "study" not in capfd.readouterr().err
