"""The content of a report's plots, read from the figures."""

from __future__ import annotations

import math
from typing import Any

import pytest
from some_trials import point, search, trial

from mimkd_ray.search.report.figures import (
    STYLES,
    curves_figure,
    finals_figure,
    importance_figure,
    information_figure,
    objective_figure,
    slice_figure,
)
from mimkd_ray.search.report.importance import Importance
from mimkd_ray.search.report.parallel_coordinates import MISSING, parallel_figure
from mimkd_ray.search.trials import Final


def traces(figure: Any) -> dict[str, Any]:
    """The traces that the legend names."""
    return {trace.name: trace for trace in figure.data if trace.showlegend is not False and trace.name}


def test_the_objective_shows_states_and_the_best_so_far() -> None:
    scores = [50.0, 40.0, None, 60.0, 70.0, math.nan, 55.0, 65.0]
    states = ["completed", "stopped", "failed", "stopped", "failed", "completed", "running", "completed"]
    trials = [trial(n, state, score=score) for n, (state, score) in enumerate(zip(states, scores, strict=True))]
    figure = objective_figure(trials, "top1")
    shown = traces(figure)
    assert set(shown) == {"best so far", *STYLES}
    # Failed and running trials are no candidates.
    assert (shown["best so far"].x, shown["best so far"].y) == ((0, 3, 7, 7), (50, 60, 65, 65))
    assert shown["stopped"].x == (1, 3)
    low, high = figure.layout.yaxis.range
    assert low < shown["failed"].y[0] < 40 < 70 < high  # without a score, on the edge
    assert low < shown["completed"].y[1] < 40
    assert [STYLES[state].symbol for state in STYLES] == [shown[state].marker.symbol for state in STYLES]
    assert len({style.symbol for style in STYLES.values()}) == len({style.color for style in STYLES.values()}) == 4
    assert "trial 3, stopped" in shown["stopped"].hovertext[1]


def test_a_diverged_cross_entropy_does_not_flatten_the_others() -> None:
    trials = [trial(n, score=score) for n, score in enumerate([1.0, 2.0, 1e6])] + [trial(3, "failed")]
    figure = objective_figure(trials, "cross_entropy")
    assert figure.layout.yaxis.type == "log"
    low, high = figure.layout.yaxis.range
    assert low < 0 < 6 < high
    assert 10**low < traces(figure)["failed"].y[0] < 1
    assert objective_figure([trial(0, score=0.5), trial(1, score=70.0)], "top1").layout.yaxis.type == "linear"


def test_slices_of_numbers_and_of_categories() -> None:
    trials = search(16)
    lr = slice_figure(trials, "top1", "optim.lr")
    assert lr.layout.xaxis.type == "log"
    assert lr.layout.xaxis.title.text == "optim.lr"
    assert lr.layout.yaxis.title.text == "held-out top-1 (%)"
    assert sum(len(trace.x) for trace in lr.data) == 16
    width = slice_figure(trials, "top1", "critic.width")
    assert sum(len(trace.x) for trace in width.data) == sum("critic.width" in t.params for t in trials) < 16
    assert width.layout.yaxis.range == lr.layout.yaxis.range
    kind = slice_figure(trials, "top1", "critic.kind")
    assert kind.layout.xaxis.ticktext == ("concat", "separable")
    medians = next(trace for trace in kind.data if trace.name == "median")
    for place, name in enumerate(("concat", "separable")):
        scores = sorted(t.score for t in trials if t.params["critic.kind"] == name and t.score is not None)
        half = len(scores) // 2
        assert medians.y[3 * medians.x.index(place - 0.35) // 3] == pytest.approx(
            scores[half] if len(scores) % 2 else (scores[half - 1] + scores[half]) / 2
        )
    for trace in kind.data:
        if trace.mode == "markers":
            assert all(min(abs(x), abs(x - 1)) <= 0.25 for x in trace.x)


def test_parallel_coordinates_go_below_the_axis_of_what_a_trial_did_not_have() -> None:
    trials = [
        trial(0, params={"lr": 0.1, "width": 4}, score=50.0),
        trial(1, params={"lr": 0.2}, score=60.0),
        trial(2, "failed", params={"lr": 0.3, "width": 8}),
    ]
    figure = parallel_figure(trials, "top1", ["lr", "width"])
    lines = {trace.hovertext.split(",")[0]: trace for trace in figure.data}
    assert lines["trial 0"].y == pytest.approx((0, 0, 0))
    assert lines["trial 1"].y == pytest.approx((0.5, MISSING, 1))
    assert lines["trial 2"].y == pytest.approx((1, 1, MISSING))
    assert lines["trial 2"].line.dash == "dash"
    assert figure.data[-1] is lines["trial 1"]  # the best one is drawn last
    assert figure.layout.xaxis.ticktext[:2] == ("lr", "width")


def test_learning_curves_have_gaps_between_trials_and_a_marker_at_the_end() -> None:
    trials = [
        trial(0, score=60.0, curve=(point(1, 50), point(2, 60))),
        trial(1, score=55.0, curve=(point(1, 55), point(2, math.nan))),
        trial(2, "stopped", score=45.0, curve=(point(1, 45),)),
        trial(3, "failed"),
    ]
    figure = curves_figure(trials, "top1")
    lines = {trace.legendgroup: trace for trace in figure.data if trace.mode == "lines" and trace.legendgroup}
    assert lines["completed"].x == (1, 2, None, 1, None)
    assert lines["completed"].y == (50, 60, None, 55, None)
    shown = traces(figure)
    assert set(shown) == {"completed", "stopped", "best: trial 0"}
    assert (shown["completed"].x, shown["completed"].y) == ((2, 1), (60, 55))
    assert lines["failed"].line.dash != lines["stopped"].line.dash
    assert "trial 0, epoch 2" in lines["completed"].hovertext[1]


def test_information_is_that_of_the_best_evaluation() -> None:
    curve = (point(1, 50, 1.0), point(2, 60, 2.0), point(3, 55, 3.0), point(4, 56, None))
    trials = [
        trial(0, best_epoch=2, curve=curve),
        trial(1, best_epoch=4, curve=curve),  # not read there: the last one that was
        trial(2, curve=(point(1, 50, math.nan),)),
    ]
    figure = information_figure(trials, "top1")
    assert figure is not None
    assert (traces(figure)["completed"].x, traces(figure)["completed"].y) == ((2, 3), (60, 55))
    assert information_figure(trials[2:], "top1") is None


def test_bars_of_importance() -> None:
    found = [
        Importance(name="a.long_name_of_a.parameter", share=0.7, trials=20, everywhere=True),
        Importance(name="<b>", share=0.4, trials=9, everywhere=False),
    ]
    figure = importance_figure(found)
    assert [trace.x for trace in figure.data] == [pytest.approx((70,)), pytest.approx((40,))]
    assert figure.layout.yaxis.ticktext == ("a.long_name_of_a.<br>parameter", "&lt;b&gt;")
    assert "the 9 trials" in figure.data[1].hovertext[0]


def test_finalists_have_a_dot_for_each_seed_and_their_spread() -> None:
    finals = [Final(trial=3, seeds=(0, 1), top1=(70.0, 72.0)), Final(trial=5, seeds=(0,), top1=(69.0,))]
    dots, means = finals_figure(finals).data
    assert (dots.x, dots.y) == ((70, 72, 69), (0, 0, 1))
    assert (means.x, means.error_x.array) == ((71, 69), (pytest.approx(math.sqrt(2)), 0))
