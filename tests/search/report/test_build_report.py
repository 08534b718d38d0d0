"""report.html: one file that loads nothing, with every section, for searches of every kind."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest
from some_trials import point, search, trial

from mimkd_ray.errors import UserError
from mimkd_ray.search.report.build_report import report_html
from mimkd_ray.search.trials import Final, Trial

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>&lt;</pre><!-- $x$ %{y} \u2028'


class Reader(HTMLParser):
    """A parser that collects the file's elements, texts and scripts, as a browser would."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        (self.scripts if self._open == "script" else self.texts).append(data)

    @property
    def sections(self) -> list[str | None]:
        return [attrs.get("id") for tag, attrs in self.elements if tag == "h2"]

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def read(
    trials: list[Trial], metric: str = "top1", title: str = "a search", finals: list[Final] | None = None
) -> Reader:
    return Reader(report_html(trials, metric, title, {"recipe": "cifar100"}, finals))


def test_every_section_is_there() -> None:
    trials = search(24)
    page = read(trials, finals=[Final(trial=4, seeds=(0, 1), top1=(70.0, 72.0))])
    assert page.sections == [
        *(
            "finals",
            "objective",
            "parameters",
            "parallel",
            "importance",
            "curves",
            "information",
            "best",
            "failed",
            "trials",
        )
    ]
    links = [attrs["href"] for tag, attrs in page.elements if tag == "a"]
    assert links == [f"#{section}" for section in page.sections]
    for text in ("a search", "cifar100", "71.00 ± 1.41 % (2 seeds)", "out of memory", "because of non-finite"):
        assert text in page.text
    best = max((t for t in trials if t.state != "failed"), key=lambda t: t.score or 0)
    assert f"Of trial {best.number}" in page.text
    assert json.dumps(best.config, indent=2) in page.text
    plots = [
        attrs["id"] for tag, attrs in page.elements if tag == "div" and "plotly-graph-div" in (attrs.get("class") or "")
    ]
    # finals, objective, three parameters, parallel coordinates, importance, curves, information
    assert plots == [f"plot-{n}" for n in range(1, 10)]


def test_it_asks_no_server_for_anything() -> None:
    page = read(search())
    for tag, attrs in page.elements:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        assert not {"src", "srcset", "data", "action"} & set(attrs)
        assert not (attrs.get("href") or "#").startswith(("http", "//"))
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    # Plotly once, a call for each plot, and the tables' script.
    assert sum(len(script) > 1_000_000 for script in page.scripts) == 1


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
    # Plotly takes its texts for HTML: what it is given is escaped, in JSON that cannot end the script.
    plots = [script for script in evil.scripts if "newPlot" in script and len(script) < 1_000_000]
    assert len(plots) == sum(attrs.get("class") == "plotly-graph-div" for _, attrs in evil.elements) > 5
    data = "".join(plots)
    assert "\\u0026lt;script" in data or "&lt;script" in data or "&lt;\\u002fscript" in data
    assert not re.search(r"(<|\\u003c)(script|img|!--)", data)


@pytest.mark.parametrize("metric", ["top1", "cross_entropy"])
@pytest.mark.parametrize(
    ("trials", "sections"),
    [
        ([], []),
        ([trial(0, "running")], ["trials"]),
        ([trial(0, params={"lr": 0.1}, score=50.0, curve=(point(1, 50.0),))], ["best", "trials"]),
        (
            [trial(n, "failed", kind="error", reason="it broke", params={"lr": n}) for n in range(3)],
            ["failed", "trials"],
        ),
    ],
)
def test_searches_that_have_little_to_show(trials: list[Trial], sections: list[str], metric: str) -> None:
    page = read(trials, metric)
    always = ["objective", "parameters", "importance", "curves", "information"] if trials else []
    assert [section for section in page.sections if section != "parallel"] == [*always, *sections]
    assert ("parallel" in page.sections) == (len({t.params.get("lr") for t in trials}) > 1)
    assert ("No trial has begun." in page.text) == (not trials)
    assert ("No trial has read mutual information." in page.text) == bool(trials)
    if "failed" in sections:
        assert page.text.count("it broke") == 6  # in both tables


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
    assert "objective" in page.sections
    for script in page.scripts:
        if len(script) < 1_000_000:
            assert not re.search(r"[\[,:](NaN|-?Infinity)", script)


def test_the_same_search_gives_the_same_report_in_any_order() -> None:
    trials = search()
    assert report_html(trials, "top1", "t", {}) == report_html(trials[::-1], "top1", "t", {})


def test_an_unknown_metric() -> None:
    with pytest.raises(UserError, match="no metric 'top5'"):
        report_html([], "top5", "t", {})


def test_the_table_begins_with_the_best() -> None:
    states = [("completed", 2.0), ("failed", 0.5), ("stopped", 1.0), ("completed", None)]
    text = report_html(
        [trial(n, state, score=score) for n, (state, score) in enumerate(states)], "cross_entropy", "t", {}
    )
    table = text[text.rindex("<tbody>") :]
    assert re.findall(r'<tr><td class=number data-key="([\d.]+)"', table) == ["2.0", "0.0", "1.0", "3.0"]
