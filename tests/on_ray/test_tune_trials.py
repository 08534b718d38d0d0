"""Trials and experiments of Ray Tune without a Ray; tests/one_ray has them under one."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from tiny_run import tiny_config
from tiny_search import tiny_job

from mimkd_ray import console
from mimkd_ray.errors import Interrupted, UserError
from mimkd_ray.on_ray import train_workers
from mimkd_ray.on_ray.search import tune_search
from mimkd_ray.on_ray.search.tune_algorithms import check_fields, with_metric
from mimkd_ray.on_ray.search.tune_trials import LargeTrial
from mimkd_ray.on_ray.worker_context import ANYBODY
from mimkd_ray.search.configs import FieldConfigs, Made
from mimkd_ray.search.finals import Finals
from mimkd_ray.search.trial_files import Table
from mimkd_ray.secret_urls import Carried
from mimkd_ray.train.records.run_dir import write_json


class Trial(LargeTrial):
    """One that Ray Tune has not made."""

    trial_id = "x"

    def __init__(self) -> None:
        """Do nothing."""


def test_a_trial_that_goes_on_does_not_read_an_old_request_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a process that Ray Tune has killed while it waited for its workers."""
    stop = tmp_path / "trials" / "x" / "stop.json"
    write_json(str(stop), {"launch_id": ANYBODY})
    seen: list[bool] = []
    monkeypatch.setattr(console, "use", print)  # this process is no trial's own
    monkeypatch.setattr(train_workers, "fit_workers", lambda *_: seen.append(stop.exists()))
    trial = Trial()
    trial.setup({}, lambda _: Made(tiny_config(), {}), str(tmp_path), 1, True, Carried())
    trial._thread.join(20)
    assert seen == [False]


def test_finals_have_the_workers_of_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process beside the search they would have no GPU, and all train at once."""
    asked: list[Any] = []
    monkeypatch.setattr(tune_search, "experiment", lambda *given: asked.append(given) or [])
    finals = Finals(tiny_job(tmp_path, finalists=1, seeds=1), Table(str(tmp_path), "top1"))
    for workers in (1, 4):
        tune_search.run_finals(finals, str(tmp_path), tune_search.Shape(workers, 2.0, 1.0, 3), own=False)
    (_, _, one, _, how, _), (_, _, several, _, wide, _) = asked
    assert not isinstance(one, type)
    assert issubclass(several, LargeTrial)
    assert (how.max_concurrent_trials, how.reuse_actors) == (3, True)
    assert (wide.max_concurrent_trials, wide.reuse_actors) == (3, False)


@pytest.mark.parametrize(
    ("number", "raised"), [(0, None), (signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Interrupted)]
)
def test_only_a_signal_interrupts_an_experiment(
    number: int,
    raised: type[BaseException] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Tune returns what it has, and so it does when a searcher has nothing more to ask for."""
    stopped: list[int] = []

    class Tuner:
        def __init__(self, *_: Any, **__: Any) -> None:
            """Do nothing."""

        def fit(self) -> list[str]:
            signal.signal(signal.SIGUSR1, lambda number, _: stopped.append(number))
            if number:
                signal.raise_signal(number)
            return ["one of three trials"]

    monkeypatch.setattr(tune_search.tune, "Tuner", Tuner)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    arguments = (str(tmp_path), "tune", print, None, tune.TuneConfig(), tune.RunConfig())
    if raised is None:
        assert tune_search.experiment(*arguments) == ["one of three trials"]
    else:
        with pytest.raises(raised):
            tune_search.experiment(*arguments)
    assert stopped == ([signal.SIGUSR1] if raised else [])
    assert ("stopping: Ray Tune saves where" in capsys.readouterr().out) == bool(raised)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_search_from_python_joins_the_cluster_of_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def connect(address: str, flag: str) -> bool:
        asked.append(address)
        raise UserError("nobody answers")

    monkeypatch.setattr(tune_search, "connect", connect)
    monkeypatch.setattr(tune_search.ray, "is_initialized", lambda: False)
    options: dict[str, Any] = {"tune_config": None, "run_config": None, "resources": None, "holdout": 0.1}
    with pytest.raises(UserError, match="nobody answers"):
        tune_search.search(tiny_config(launch={"address": "head:6379"}), ["temperature"], **options)
    assert asked == ["head:6379"]


SPACES: list[tuple[Any, dict[str, Any], str]] = [
    (
        {"optim.lr": tune.choice(["high", "low"])},
        {},
        "no trial can have values of this space: optim.lr is '(high|low)'",
    ),
    ({"optim.lr": tune.uniform(-1, -0.1)}, {}, "optim.lr is -0.*give a rate above 0"),
    ({"loss.bound": tune.grid_search(["dv", "jds"])}, {}, "no trial can have loss.bound 'jds': loss.bound is 'jds'"),
    ({"optim.lr": 0.1, "train": {"lane_batch": tune.uniform(8, 64)}}, {}, "give a whole number"),
    ({}, {}, "the space is empty"),
    ("temprature", {}, "'temprature' is unknown; did you mean 'temperature'"),
    (lambda trial: trial, {}, r"a space is called as function\(trial, config, pairs\)"),
    (
        "rate",
        {"metric": "accuracy", "mode": "max"},
        "the metric 'accuracy' is not reported by trials: give top1, cross",
    ),
    ("rate", {"metric": "cross_entropy", "mode": "max"}, "the mode max, which looks for the worst: give min"),
]


@pytest.mark.parametrize(("space", "how", "message"), SPACES)
def test_a_search_that_cannot_be_is_refused_before_ray_starts(
    space: Any, how: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_search, "connect", lambda *_: pytest.fail("Ray would start"))
    options: dict[str, Any] = {"tune_config": tune.TuneConfig(**how), "run_config": None, "resources": None}
    with pytest.raises(UserError, match=message):
        tune_search.search(tiny_config(), space, **options, holdout=0.1)


@pytest.mark.parametrize(
    ("given", "metric", "mode"),
    [
        ({}, "top1", "max"),
        ({"metric": "cross_entropy"}, "cross_entropy", "min"),
        ({"metric": "feature/layer4-stage3/nats", "mode": "min"}, "feature/layer4-stage3/nats", "min"),
        ({"scheduler": ASHAScheduler(metric="top5", mode="max")}, None, None),
    ],
)
def test_what_a_tune_config_leaves_out(given: dict[str, Any], metric: str | None, mode: str | None) -> None:
    config = with_metric(tune.TuneConfig(**given))
    assert (config.metric, config.mode) == (metric, mode)


def test_values_that_ray_tune_resolves_are_not_drawn() -> None:
    """And of a range of which a part is in order, this part is enough."""
    values = {"optim.lr": tune.uniform(-0.1, 0.1), "loss.kd_weight": tune.choice([0.0, 0.5, 1])}
    check_fields(FieldConfigs(tiny_config()), values)
    check_fields(FieldConfigs(tiny_config()), {"optim.lr": tune.sample_from(lambda spec: spec.config.x)})
