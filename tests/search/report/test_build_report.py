"""report.html: one file that loads nothing, with every section, for searches of every kind."""

from __future__ import annotations

import json
import math
import re

import pytest
from page_reader import Reader
from some_trials import point, search, trial

from mimkd_ray.search.report.build_report import report_html
from mimkd_ray.search.trials import Final, Trial

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>&lt;</pre><!-- $x$ %{y} \u2028'


def read(
    trials: list[Trial], metric: str = "top1", title: str = "a search", finals: list[Final] | None = None
) -> Reader:
    return Reader(report_html(trials, metric, title, {"recipe": "cifar100"}, finals))


def test_every_section_is_there() -> None:
    trials = search(40)
    page = read(trials, finals=[Final(trial=4, seeds=(0, 1), top1=(70.0, 72.0))])
    names = "finals history parameters parallel importance curves best failures trials"
    assert page.sections == names.split()
    assert [a["href"] for tag, a in page.elements if tag == "a"] == [f"#{section}" for section in page.sections]
    for text in ("a search", "cifar100", "71.00 ± 1.41 %", "out of memory", "because of non-finite"):
        assert text in page.text
    best = max((t for t in trials if t.state != "failed"), key=lambda t: t.score or 0)
    assert "Of trial 4, the best finalist" in page.text
    assert "top-1 of the best finalist, trial 4" in page.text
    assert json.dumps(trials[4].config, indent=2) in page.text
    assert best.number != 4
    alone = read(trials)
    assert f"Of trial {best.number}, the best score" in alone.text
    assert json.dumps(best.config, indent=2) in alone.text
    slices = ["optim.lr", "critic.kind", "critic.width"]
    assert [title for title in page.titles if title in slices] == slices
    assert "Without those that only some trials have: critic.width" in page.text


def test_optuna_draws_the_trials_with_their_own_numbers() -> None:
    trials = search(40)
    page = read(trials)
    scored = {t.number: t.score for t in trials if t.state in ("completed", "stopped")}
    history = next(trace for trace in page.figure("Score by trial")["data"] if trace["mode"] == "markers")
    assert dict(zip(history["x"], history["y"], strict=True)) == scored
    (dots,) = page.figure("critic.width")["data"]
    widths = {t.number: t.params["critic.width"] for t in trials if t.number in scored and "critic.width" in t.params}
    assert sorted(zip(dots["x"], dots["y"], strict=True)) == sorted((w, scored[n]) for n, w in widths.items())
    (bars,) = page.figure("Importance of hyperparameters")["data"]
    assert sum(bars["x"]) == pytest.approx(1)
    lines = page.figure("Learning curves")["data"]
    assert sorted(len(line["x"]) for line in lines) == sorted(len(t.curve) for t in trials if t.number in scored)


def test_axes_of_parallel_coordinates_have_whole_names() -> None:
    """Optuna cuts them to 20 characters, after which these two are alike."""
    names = ["critic.learn_temperature", "critic.learn_temper_two", "lr"]
    page = read([trial(n, params=dict.fromkeys(names, 0.1 * (n + 1)), score=50.0 + n) for n in range(8)])
    shown = page.figure("Parallel coordinates")["layout"]["xaxis"]["ticktext"]
    assert [text.replace("<br>", "") for text in shown] == ["held-out top-1 (%)", *sorted(names)]
    assert max(len(line) for text in shown for line in text.split("<br>")) <= 16


def test_strings_of_trials_are_text_everywhere() -> None:
    trials = [
        trial(
            n,
            ("completed", "failed")[n % 2],
            kind=EVIL,
            reason=EVIL,
            params={EVIL: f"{EVIL}{n % 3}", "lr": 0.1 * (n + 1)},
            score=50.0 + n,
            config={EVIL: EVIL},
            curve=(point(1, 50.0 + n, 1.0),),
        )
        for n in range(20)
    ]
    plain, evil = read(search(20)), Reader(report_html(trials, "top1", EVIL, {EVIL: EVIL}))
    assert {tag for tag, _ in evil.elements} <= {tag for tag, _ in plain.elements}
    assert not any(name.startswith("on") for _, attrs in evil.elements for name in attrs)
    assert EVIL in evil.text
    # Plotly takes its texts for HTML: what it is given is escaped.
    assert len(evil.figures) > 5
    assert "&lt;script&gt;" in evil.packed("figures")
    assert not re.search(r"(<|\\u003c)(script|img|!--)", evil.packed("figures"))


@pytest.mark.parametrize("metric", ["top1", "cross_entropy"])
@pytest.mark.parametrize(
    ("trials", "sections"),
    [
        ([], []),
        ([trial(0, "running")], ["trials"]),
        (
            [trial(0, params={"lr": 0.1}, score=50.0, curve=(point(1, 50.0),))],
            ["history", "importance", "curves", "best", "trials"],
        ),
        (
            [trial(n, "failed", kind="error", reason="it broke", params={"lr": n}) for n in range(3)],
            ["failures", "trials"],
        ),
    ],
)
def test_searches_that_have_little_to_show(trials: list[Trial], sections: list[str], metric: str) -> None:
    page = read(trials, metric)
    assert page.sections == sections
    assert ("No trial has begun." in page.text) == (not trials)
    assert ("No trial is usable so far." in page.text) == (bool(trials) and "best" not in sections)
    failed = [trial for trial in trials if trial.state == "failed"]
    assert page.text.count("it broke") == len(failed) + bool(failed), "once for all that failed alike"
    assert ("0, 1, 2" in page.text) == bool(failed)
    assert "Share of trials up to a score" not in page.titles, "of one trial it is empty"


@pytest.mark.parametrize("metric", ["top1", "cross_entropy"])
def test_numbers_that_are_not_finite_break_nothing(metric: str) -> None:
    nan, inf = math.nan, math.inf
    trials = [
        trial(
            n,
            ("completed", "stopped", "failed", "running")[n % 4],
            params={
                "lr": [nan, inf, 1e308, -1e308, 5e-324, 0.1][n % 6],
                "n": 10 ** (400 * (n % 2)),
                "m": [1, True, "1"][n % 3],
            },
            score=[nan, inf, -inf, 1e300, 5e-324, 2.0, 0.0][n % 7],
            best_epoch=1,
            seconds=[nan, inf, 1.0][n % 3],
            config={"x": nan},
            curve=(point(1, nan, inf), point(2, inf, nan), point(3, 1e300, 1.0)),
        )
        for n in range(28)
    ]
    page = read(trials, metric, finals=[Final(trial=0, seeds=(0, 1), top1=(nan, 50.0))])
    assert "history" in page.sections
    assert not re.search(r"[\[,: ](NaN|-?Infinity)", page.packed("figures"))


def test_the_same_search_gives_the_same_report_in_any_order() -> None:
    trials = search()
    assert report_html(trials, "top1", "t", {}) == report_html(trials[::-1], "top1", "t", {})


def test_the_table_begins_with_the_best() -> None:
    states = [("completed", 2.0), ("failed", 0.5), ("stopped", 1.0), ("completed", None)]
    text = report_html(
        [trial(n, state, score=score) for n, (state, score) in enumerate(states)], "cross_entropy", "t", {}
    )
    table = text[text.rindex("<tbody>") :]
    assert re.findall(r'<tr><td class=number data-key="([\d.]+)"', table) == ["2.0", "0.0", "1.0", "3.0"]


def test_schedules_of_a_population() -> None:
    """A figure for every number that moved: the best member's line is named, strings and constants have none."""
    past = [(2, {"lr": 0.1, "kd": 1.0, "kind": "dot"}), (4, {"lr": 0.001, "kd": 1.0, "kind": "dot"})]
    pasts = [[*past, (4, {**past[1][1], "lr": 0.5})], [(epoch, {**own, "kd": 2.0}) for epoch, own in past[1:]]]
    members = [
        trial(at, score=50.0 + at, params=past[1][1], schedule=tuple(own), curve=(point(4, 50.0),))
        for at, own in enumerate(pasts)
    ]
    page = read(members)
    assert "schedules" in page.sections
    assert "that of trial 1, the best" in page.text
    assert page.titles.count("lr") == 1, "its slice needs two values"
    assert "kd" not in page.titles, "members differ in it, and none moved it"
    (moved,) = [each for each in page.figure("lr")["data"] if each["name"] == "trial 0"]
    assert (moved["x"], moved["y"]) == ([0, 2, 2, 4], [0.1, 0.1, 0.001, 0.001]), "0.5 was trained for no epoch"
    assert "schedules" not in read(search(40)).sections
