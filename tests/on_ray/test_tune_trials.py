"""Trials and experiments of Ray Tune without a Ray; tests/one_ray has them under one."""

from __future__ import annotations

import math
import pickle
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from tiny_run import tiny_config
from tiny_search import tiny_configs, tiny_job

from mimkd_ray import console
from mimkd_ray.errors import Interrupted, UserError
from mimkd_ray.on_ray import train_workers
from mimkd_ray.on_ray.nodes.node_capacity import Capacity
from mimkd_ray.on_ray.search import tune_search, tune_trials
from mimkd_ray.on_ray.search.tune_algorithms import check_fields, optuna_for, with_metric
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
    (
        {"optim": tune.choice([{"lr": 0.1}, {"lr": -1.0}])},
        {},
        r"no trial can have optim {'lr': -1.0}: optim.lr is -1.0: give a rate above 0",
    ),
    ({"optim": tune.choice([{"lrr": 0.1}])}, {}, "hyperparameter 'optim.lrr' is no field of a config; did you mean"),
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
    sections = [{"lr": 0.1}, {"schedule": "step", "milestones": [1]}]
    check_fields(
        FieldConfigs(tiny_config()), {"optim": tune.choice(sections), "loss": tune.grid_search([{"kd_weight": 1}])}
    )


def test_a_metric_that_only_the_scheduler_has_is_the_searchers_too(tmp_path: Path) -> None:
    """Ray Tune tells it to nobody else."""
    given = with_metric(tune.TuneConfig(scheduler=ASHAScheduler(metric="cross_entropy", mode="min")))
    found = optuna_for(tiny_configs(tmp_path), given)
    assert (found.metric, found.mode) == ("cross_entropy", "min")
    assert set(found.suggest("1")) >= {"critic.learn_temperature"}


def test_names_of_spaces_are_found_once_for_all_trials(tmp_path: Path) -> None:
    """Their processes get them with the pickled map: to find them takes a second."""
    configs = tiny_configs(tmp_path)
    assert "asked" not in vars(pickle.loads(pickle.dumps(configs)))  # noqa: S301
    tune_trials.checked(configs)
    assert "critic.learn_temperature" in vars(pickle.loads(pickle.dumps(configs)))["asked"]  # noqa: S301


Heard = dict[str, Any]


def searched(folder: Path, monkeypatch: pytest.MonkeyPatch, run_config: Any = None, **options: Any) -> Heard:
    """What a search of one trial gives to Ray, on a cluster of two CPUs."""
    heard: Heard = {}

    class Tuner:
        def __init__(self, trial: Any, **given: Any) -> None:
            heard.update(given, trial=trial)

        def fit(self) -> None:
            """Do nothing."""

    monkeypatch.setattr(tune_search.tune, "Tuner", Tuner)
    monkeypatch.setattr(tune_search.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(Capacity, "of_cluster", lambda: Capacity(((2, 0),)))
    monkeypatch.setattr(
        tune_search, "prepare_on_ray", lambda _, folder, shape: heard.update(folder=folder, shape=shape)
    )
    config = tiny_config(run={"root": str(folder), "loggers": options.pop("loggers", ())})
    how = tune.TuneConfig(num_samples=1)
    given = {"tune_config": how, "run_config": run_config, "resources": None, "holdout": 0.3} | options
    tune_search.search(config, {"optim.lr": 0.1}, **given)
    return heard


def test_a_search_from_python_can_be_restored_with_the_trainable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tuner.restore takes a trainable of the same name."""
    names = {each.__name__ for each in (searched(tmp_path, monkeypatch)["trial"], tune_trials.trainable(tiny_config()))}
    assert len(names) == 1


def test_what_trials_share_is_not_in_a_folder_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be another one for every worker."""
    monkeypatch.chdir(tmp_path)
    run = tune.RunConfig(name="x", storage_path="there")
    assert searched(tmp_path / "own", monkeypatch, run)["folder"] == str(tmp_path / "there" / "x")
    run = tune.RunConfig(name="x", storage_path="bucket/there", storage_filesystem=pyarrow.fs.LocalFileSystem())
    assert searched(tmp_path / "own", monkeypatch, run)["folder"] == str(tmp_path / "own" / "x")


def test_the_loggers_of_a_config_are_the_searchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^--run.loggers comet: comet_ml is not installed"):
        searched(tmp_path, monkeypatch, loggers=("comet",))
    monkeypatch.setattr(tune_search, "loggers", lambda names, project: [*names, project])
    own = tune.Callback()
    heard = searched(tmp_path, monkeypatch, tune.RunConfig(name="x", callbacks=[own]), loggers=("comet",))
    assert heard["run_config"].callbacks == [own, "comet", "search-tiny"]


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"CPU": 3}, "^1 trial with 3 CPUs each do not fit: the cluster has 2 CPUs and 0 GPUs on 1 node: give smaller"),
        ({"GPU": 1}, "do not fit"),
        ({"cpu": 1}, r"^resources is {'cpu': 1}: give CPU and GPU; mimkd_ray.trainable takes tune.with_resources"),
        ({"CPU": 1, "memory": 9}, "give CPU and GPU"),
        ({}, "give CPU and GPU"),
    ],
)
def test_resources_that_no_trial_can_have_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        searched(tmp_path, monkeypatch, resources=resources)
    assert searched(tmp_path, monkeypatch, resources={"CPU": 2})["shape"].bundles().required_resources == {"CPU": 2.0}


@pytest.mark.parametrize("fail_fast", [False, True])
def test_a_failure_is_a_result_unless_it_ends_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_fast: bool
) -> None:
    how = tune.RunConfig(name="x", failure_config=tune.FailureConfig(fail_fast=fail_fast))
    trial = searched(tmp_path, monkeypatch, how)["trial"]
    told: list[Any] = []
    monkeypatch.setattr(tune_trials.tune, "report", lambda figures, **_: told.append(figures))
    monkeypatch.setattr(console, "use", print)
    monkeypatch.setattr(tune_trials.tune, "get_checkpoint", lambda: None)
    with pytest.raises(UserError, match="hyperparameter") if fail_fast else nullcontext():
        trial({"optim.lrr": 1})
    assert [each["failed"] for each in told] == ([] if fail_fast else ["error"])


def test_a_ceiling_that_a_bound_does_not_have_is_not_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """TensorBoard's writer prints a line about each infinity."""
    told: list[Any] = []
    monkeypatch.setattr(tune_trials.tune, "report", told.append)
    figures = {"a/ceiling": math.inf, "b/ceiling": 3.4, "a/nats": 1.0, "cross_entropy": math.inf}
    tune_trials.reporter(str(tmp_path))(figures)
    assert told == [{"b/ceiling": 3.4, "a/nats": 1.0, "cross_entropy": math.inf}]
