"""Searches: packs, populations, failures and finals; and a Tuner of the user's own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from jobs_here import ROOT, TAKES_LONG
from some_trials import read_trials
from tiny_run import tiny_config
from tiny_search import odd, tiny_job

import mimkd_ray
from mimkd_ray import console
from mimkd_ray.cli import search as search_line
from mimkd_ray.config import Config, SearchConfig, SearchJob
from mimkd_ray.config.form.json_form import from_dict
from mimkd_ray.errors import UserError
from mimkd_ray.search.trial_files import Table
from mimkd_ray.search.trials import Trial
from mimkd_ray.train.records import run_files

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def run(folder: Path, status: int = 0, **search: Any) -> list[Trial]:
    """Run a search of two epochs in ``folder``/s to its end, as its command does, and return its table."""
    assert search_line.search(job_of(folder, **search)) == status
    trials, _ = read_trials(str(folder / "s" / "trials.parquet"))
    assert trials == Table(str(folder / "s"), "top1").trials()
    return trials


def job_of(folder: Path, **search: Any) -> SearchJob:
    sections: dict[str, Any] = {"run": {"root": str(folder), "name": "s"}, "launch": {"backend": "ray", "gpu": "off"}}
    return tiny_job(folder, {**sections, "train": {"epochs": search.pop("train_epochs", 2)}}, **search)


def test_failures_and_finals(
    joined: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grid with trials that run out of memory or explode: they are the worst, and the search ends well."""
    shown: list[console.Status] = []
    monkeypatch.setattr(console, "show", lambda status: shown.append(status) if status else None)
    search = {"space": ("tiny_search:unlucky",), "algorithm": "grid", "trials": 9, "grace": 2}
    trials = run(tmp_path, **search, finalists=1, seeds=2)
    assert len(trials) == 3
    kinds = {(trial.params["fate"], trial.state, trial.kind) for trial in trials if trial.params["fate"] != "fine"}
    assert kinds == {("huge", "failed", "out of memory"), ("wild", "failed", "non-finite")}
    fine = [trial for trial in trials if trial.params["fate"] == "fine"]
    assert "completed" in {trial.state for trial in fine}
    assert all(point.epoch in (1, 2) for trial in fine for point in trial.curve)
    told = json.loads((tmp_path / "s" / "finals.json").read_text())
    assert sorted(told["finals"][0]["seeds"]) == ["1", "2"]
    counts = [(each.done, each.total, each.unit) for each in shown if each.what == "training the finalists"]
    assert (counts[0], counts[-1]) == ((0, 2, "runs"), (2, 2, "runs"))
    assert from_dict(Config, json.loads((tmp_path / "s" / "best.json").read_text())).data.holdout == 0
    assert "out of memory" in (tmp_path / "s" / "report.html").read_text()
    capsys.readouterr()
    assert run(tmp_path, **search, finalists=1, seeds=2) == trials
    out = capsys.readouterr().out
    assert "3 trials:" in out
    assert "a trial" not in out, "a finished search prints its outcome, and begins nothing"
    left = run_files.remove_run(str(tmp_path / "s"), "search")
    assert left == []


@TAKES_LONG
def test_members_of_packs_are_rows(joined: str, tmp_path: Path) -> None:
    trials = run(tmp_path, trials=5, pack=3, reduction=2)
    assert [trial.number for trial in trials] == [0, 1, 2, 3, 4]
    names = Table(str(tmp_path / "s"), "top1").rows
    assert sorted(name.partition("/")[2] for name in names) == ["0", "0", "1", "1", "2"]
    ends = sorted((trial.state, trial.kind, len(trial.curve)) for trial in trials)
    assert ends == [("completed", "", 2)] * 3 + [("stopped", "early", 1)] * 2
    assert len({trial.params["critic.temperature"] for trial in trials}) == 5
    for name, trial in names.items():
        pack, _, member = name.partition("/")
        (last,) = sorted((tmp_path / "s" / "tune" / f"trial-{pack}").glob("checkpoint_*"))[-1:]
        config = json.loads((last / member / "config.json").read_text())
        assert config["loss"]["critic"]["temperature"] == trial.config["loss"]["critic"]["temperature"]
        assert (last / member / "student.safetensors").exists() == (trial.state == "completed")


@TAKES_LONG
def test_a_population_moves_its_numbers(joined: str, tmp_path: Path) -> None:
    """The worst goes on from the best one's checkpoint, with other numbers, and nobody fails for it."""
    search = {"trials": 3, "scheduler": "pbt", "space": ("tiny_search:steady",), "train_epochs": 3}
    trials = run(tmp_path, **search)
    assert [(trial.state, trial.curve[-1].epoch) for trial in trials] == [("completed", 3)] * 3
    policies = [json.loads(line) for line in (tmp_path / "s" / "tune" / "pbt_global.txt").read_text().splitlines()]
    assert policies
    moved = {trial.params["lr"] for trial in trials}
    for trial in trials:  # each goes on where its last values ended, the last ones being its own
        epochs = [epoch for epoch, _ in trial.schedule]
        assert epochs == sorted({*epochs}), "values that came after the last epoch were trained for none"
        assert epochs[-1] == 3
        assert trial.schedule[-1][1] == trial.params
    jumps = {(old[1]["lr"], new[1]["lr"]) for trial in trials for old, new in pairwise(trial.schedule)}
    assert jumps
    assert jumps <= {(within(policy[4]["lr"]), within(policy[5]["lr"])) for policy in policies}
    assert "Schedules of the population" in (tmp_path / "s" / "report.html").read_text()
    drawn = {json.loads(path.read_text())["lr"] for path in (tmp_path / "s" / "tune").glob("*/params.json")}
    assert moved <= drawn | {within(policy[-1]["lr"]) for policy in policies}


def within(lr: float) -> float:
    """A rate in the range of `tiny_search.steady`, which Ray's perturbations may leave."""
    return min(max(lr, 1e-3), 0.1)


def test_a_tuner_of_ones_own(joined: str, tmp_path: Path) -> None:
    """HyperOpt and MLflow's callback, in what a user writes."""
    pytest.importorskip("hyperopt")
    mlflow = pytest.importorskip("mlflow")
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.tune.search.hyperopt import HyperOptSearch

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tuner = tune.Tuner(
        mimkd_ray.trainable(tiny_config(), holdout=0.3),
        param_space={"loss": {"kd_weight": tune.loguniform(0.03, 3)}, "optim.lr": tune.choice([0.05, 0.02])},
        tune_config=tune.TuneConfig(metric="top1", mode="max", search_alg=HyperOptSearch(), num_samples=2),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path), name="mine", callbacks=[MLflowLoggerCallback(uri, experiment_name="mine")]
        ),
    )
    results = tuner.fit()
    best = results.get_best_result()
    assert (results.num_terminated, results.num_errors) == (2, 0)
    assert best.metrics["epoch"] == 2
    with best.checkpoint.as_directory() as folder:
        config = json.loads(Path(folder, "config.json").read_text())
        assert Path(folder, "best.safetensors").exists()
    assert config["loss"]["kd_weight"] == best.config["loss"]["kd_weight"]
    assert config["data"]["holdout"] == 0.3
    mlflow.set_tracking_uri(uri)
    runs = mlflow.search_runs(experiment_names=["mine"])
    assert sorted(runs["metrics.top1"]) == sorted(each.metrics["top1"] for each in results)


def test_search_returns_what_people_know(joined: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import tune

    config = tiny_config(run={"root": str(tmp_path)}, launch={"gpu": "off"})
    how = tune.TuneConfig(metric="top1", mode="max", num_samples=1)
    run_config = tune.RunConfig(storage_path=str(tmp_path), name="mine", verbose=0)
    results = mimkd_ray.search(config, ["temperature", odd], tune_config=how, run_config=run_config, holdout=0.3)
    frame = results.get_dataframe()
    assert sorted(frame["config/kd_weight"]) == sorted(each.config["kd_weight"] for each in results)
    assert set(frame["epoch"]) == {2}
    assert (tmp_path / "mine" / "teacher.json").exists(), "measured once for all"
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "search.md").read_text(), re.DOTALL)
    (block,) = (each for each in blocks if "mimkd_ray.search(" in each)
    monkeypatch.setattr(mimkd_ray, "search", lambda *_: results)
    names: dict[str, Any] = {"mimkd_ray": mimkd_ray, "config": config}
    exec(block, names)
    assert Path(names["student"].path, "best.safetensors").exists()
    assert isinstance(names["tuner"], tune.Tuner)


@pytest.mark.parametrize("scheduler", ["hyperband", "median", "pb2", "asha"])
def test_schedulers_are_made(tmp_path: Path, scheduler: Any) -> None:
    from ray.tune import schedulers
    from ray.tune.schedulers.pb2 import PB2
    from tiny_search import tiny_configs

    from mimkd_ray.on_ray.search.tune_algorithms import scheduler_of

    kinds: Mapping[str, Any] = {
        "hyperband": schedulers.HyperBandScheduler,
        "median": schedulers.MedianStoppingRule,
        "pb2": PB2,
        "asha": schedulers.ASHAScheduler,
    }
    search = SearchConfig(scheduler=scheduler, grace=9)
    assert type(scheduler_of(search, tiny_configs(tmp_path))) is kinds[scheduler]


def test_searchers_of_ones_own_are_made(tmp_path: Path) -> None:
    from tiny_search import tiny_configs

    from mimkd_ray.on_ray.search.tune_algorithms import loggers, searcher_of

    configs = tiny_configs(tmp_path)
    with pytest.raises(UserError, match=r"^--run.loggers comet: comet_ml is not installed; pip install comet-ml"):
        loggers(["comet"], "x")
    with pytest.raises(UserError, match="tiny_search has no function 'nothing'"):
        searcher_of(SearchConfig(algorithm="tiny_search:nothing"), configs)
    searcher, space, samples = searcher_of(SearchConfig(algorithm="tiny_search:own_searcher", trials=7), configs)
    assert (searcher.max_concurrent, samples) == (7, 7)
    with pytest.raises(UserError, match="'tiny_search:no_searcher' returned None: return a searcher of Ray Tune"):
        searcher_of(SearchConfig(algorithm="tiny_search:no_searcher"), configs)
    assert space is not None
    assert sorted(space) == ["critic.learn_temperature", "critic.temperature"]
