"""Loggers of a run: what they get, the same run after a restart, and what happens where they fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_config

from mimkd_ray.config import RunConfig
from mimkd_ray.config.form.json_form import to_dict
from mimkd_ray.errors import UserError
from mimkd_ray.train.records import loggers, run_files
from mimkd_ray.train.records.run_dir import MetricsLog, write_json


def run_of(folder: Path, *names: Any, start: int = 0) -> MetricsLog:
    folder.mkdir(exist_ok=True)
    config = replace(tiny_config(), run=RunConfig(loggers=names, tensorboard=False))
    write_json(str(folder / "config.json"), to_dict(config))
    return MetricsLog(str(folder), start, config.run)


def test_mlflow_gets_every_number_and_a_run_that_goes_on_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(None)
    log = run_of(tmp_path / "mine", "mlflow")
    for step in (1, 2):
        log.write("train", step, {"ce": 1.0 / step, "feature/stage3:stage3/nats": 0.5, "lost": float("nan")})
    log.write("eval", 2, {"epoch": 1, "top1": 40.0})
    log.close()
    log = run_of(tmp_path / "mine", "mlflow", start=2)
    log.write("train", 3, {"ce": 0.25})
    log.close()
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(f"mimkd-{tiny_config().recipe}")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("mine", "FINISHED")
    assert found.data.params["optim.lr"] == str(tiny_config().optim.lr)
    assert set(found.data.metrics) == {"train/ce", "train/feature/stage3:stage3/nats", "eval/epoch", "eval/top1"}
    points = [(each.step, each.value) for each in client.get_metric_history(found.info.run_id, "train/ce")]
    lines = [json.loads(line) for line in (tmp_path / "mine" / "metrics.jsonl").read_text().splitlines()]
    assert points == [(line["step"], line["ce"]) for line in lines if line["kind"] == "train"]
    assert "goes on without" not in capsys.readouterr().out
    assert run_files.remove_run(str(tmp_path / "mine")) == []


def test_a_logger_that_fails_is_told_once_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    def broken(values: dict[str, float], step: int) -> None:
        calls.append(step)
        raise ConnectionError("no answer")

    fakes = {
        "wandb": lambda *_: loggers.Opened("w", broken, calls.clear),
        "comet": lambda *_: loggers.Opened("c", lambda values, step: calls.append(values), lambda: calls.append("end")),
    }
    monkeypatch.setattr(loggers, "_OPEN", fakes)
    monkeypatch.setattr(loggers, "require_loggers", lambda _: None)
    log = run_of(tmp_path / "mine", "wandb", "comet")
    log.write("train", 1, {"ce": 1.0})
    log.write("train", 2, {"ce": 2.0})
    log.close()
    assert calls == [1, {"train/ce": 1.0}, {"train/ce": 2.0}, "end"]
    out = capsys.readouterr().out
    assert out.count("the run goes on without wandb: ConnectionError: no answer") == 1
    assert json.loads((tmp_path / "mine" / "loggers.json").read_text()) == {"wandb": "w", "comet": "c"}


def test_a_package_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loggers.MODULES, "comet", "no_such_module")
    with pytest.raises(UserError, match=r"^--run.loggers comet: no_such_module is not installed; pip install no_such"):
        loggers.require_loggers(["comet"])
