"""jobs/search.py: what it refuses, the resources of trials, trials of several workers. tests/one_ray has the rest."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jobs_here import CHANCE, ENVIRONMENT, ROOT, TAKES_LONG, Job, kill, run, tree
from some_trials import read_trials
from tiny_search import figures, tiny_configs, tiny_job

from mimkd_ray.cli import search as search_line
from mimkd_ray.cli.search import main
from mimkd_ray.config import Config, SearchConfig
from mimkd_ray.config.form.json_form import to_dict
from mimkd_ray.config.jobs.search import search_job
from mimkd_ray.errors import UserError
from mimkd_ray.recipes import demo
from mimkd_ray.search.summary import Clock
from mimkd_ray.search.trial_files import Table
from mimkd_ray.train.records import loggers

# Digits, a random teacher, trials of three epochs of four steps.
FLAGS = (
    *("demo", "--teacher.train", "false", "--teacher.name", "cifar/resnet8", *CHANCE, "--data.subset", "80"),
    *("--train.lanes", "2", "--train.lane-batch", "10", "--train.eval-batch", "150", "--train.information-rows", "50"),
    *("--loss.critic.width", "16", "--search.epochs", "3", "--search.holdout", "0.2", "--search.finalists", "0"),
)


def command(root: Path, *more: str) -> list[str]:
    job = str(ROOT / "jobs" / "search.py")
    return [sys.executable, job, *FLAGS, "--run.root", str(root), "--run.name", "s", *more]


def rows(root: Path) -> dict[int, dict[str, Any]]:
    found = [json.loads(file.read_text()) for file in sorted((root / "s" / "trials").glob("*.json"))]
    return {row["number"]: row for row in found}


@TAKES_LONG
@pytest.mark.ray
@pytest.mark.slow
def test_a_search_whose_only_node_dies_ends_and_goes_on(tmp_path: Path) -> None:
    flags = ("--search.trials", "2", "--search.scheduler", "none", "--search.epochs", "60")
    job = Job(command(tmp_path, *flags), tmp_path / "log")
    job.wait_until(lambda: len(rows(tmp_path).get(0, {}).get("curve", ())) >= 1)
    kill([pid for pid in tree(job.process.pid) if (Path("/proc") / str(pid) / "comm").read_text() == "raylet\n"])
    assert job.end(120) == 3
    assert "that a trial needs; the same command goes on from there" in (tmp_path / "log").read_text()
    run(command(tmp_path, *flags))
    assert [each["state"] for each in rows(tmp_path).values()] == ["completed"] * 2


@TAKES_LONG
@pytest.mark.ray
@pytest.mark.slow
def test_trials_of_two_workers_are_stopped_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trial takes all CPUs. The second learns nothing: it is asked to end, and the third finds all CPUs free."""
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{ROOT}/tests:{ROOT}")
    flags = ("--search.workers", "2", "--search.algorithm", "grid", "--search.reduction", "2", "--search.epochs", "60")
    text = run(command(tmp_path, *flags, "--search.space", "tiny_search:slow_second"))
    assert "1 at a time, 2 workers with 1 CPU each a trial" in text
    found = rows(tmp_path)
    assert [each["state"] for each in found.values()][:2] == ["completed", "stopped"]
    assert len(found) == 3
    trials, _ = read_trials(str(tmp_path / "s" / "trials.parquet"))
    assert trials[0].curve[-1].epoch == 60
    assert trials[1].curve[-1].epoch < 60
    assert trials[2].curve
    assert json.loads((tmp_path / "s" / "trials" / found[0]["id"] / "result.json").read_text())["workers"] == 2


def test_a_search_without_ray_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*FLAGS, "--launch.backend", "local", "--run.root", str(tmp_path)]
    assert main({"demo": _demo}, flags) == 2
    assert "a search is run by Ray Tune" in capsys.readouterr().err


def _demo() -> Config:
    """Digits."""
    return demo()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--search.space", "tempreature"], "search.space 'tempreature' is unknown"),
        (["--search.trials", "0"], "would never end"),
        (
            ["--search.scheduler", "pbt", "--search.space", "bound"],
            "pbt moves numbers, and search.space bound has none",
        ),
        (
            ["--data.labels", "none", "--compare.seeds", "0"],
            "search.metric is top1, and nothing teaches the student's head",
        ),
        (["--cache.root", "nowhere", "--data.views", "2"], "the cache .*nowhere does not fit this run"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    arguments = [*FLAGS, "--run.root", str(tmp_path), *flags]
    assert main({"demo": _demo}, arguments) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1


def test_a_missing_searcher_is_told_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    none = SimpleNamespace(util=SimpleNamespace(find_spec=lambda _: None))
    monkeypatch.setattr(loggers, "importlib", none)
    monkeypatch.setattr("mimkd_ray.cli.search.run", lambda *_: pytest.fail("Ray would start"))
    flags = [*FLAGS, "--run.root", str(tmp_path), "--search.algorithm"]
    assert main({"demo": _demo}, [*flags, "ax"]) == 2
    assert "--search.algorithm ax: ax is not installed; pip install ax-platform" in capsys.readouterr().err
    assert main({"demo": _demo}, [*flags, "tiny_search:nothing"]) == 2
    assert "tiny_search has no function 'nothing'" in capsys.readouterr().err


def test_a_search_that_was_moved_is_told_to_go_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray Tune's state has the old place: new trials failed there, and their rows were written there."""
    monkeypatch.setattr("mimkd_ray.cli.search.environment.prepare", lambda _: pytest.fail("Ray would start"))
    old = tmp_path / "old" / "s"
    old.mkdir(parents=True)
    Clock(str(old)).save()
    moved = tmp_path / "new"
    (tmp_path / "old").rename(moved)
    assert main({"demo": _demo}, [*FLAGS, "--run.root", str(moved), "--run.name", "s"]) == 2
    error = capsys.readouterr().err
    assert f"{moved}/s was begun as {old}, where Ray Tune's state would go on: move it back there" in error
    (tmp_path / "old").symlink_to(moved)
    Clock(str(moved / "s")).check_place()


def test_hours_are_those_of_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an hour of preparation, an hour of trials, two hours of finals."""
    from mimkd_ray.on_ray import driver_console
    from mimkd_ray.on_ray.search import tune_search

    now, folder = [1000.0], str(tmp_path / "s")
    monkeypatch.setattr("mimkd_ray.search.summary.time.monotonic", lambda: now[0])
    seen: list[float] = []

    def lasts(seconds: float) -> Callable[..., Any]:
        def work(*_: Any) -> dict[int, Any]:
            seen.append(Clock(folder).hours)
            now[0] += seconds
            return {}

        return work

    job, configs = tiny_job(tmp_path, finalists=1), tiny_configs(tmp_path)
    table = Table(folder, "top1")
    table.begin("x", configs({"critic.learn_temperature": False, "critic.temperature": 0.5}), {})
    table.heard("x", figures(2, 50.0))
    table.ended("x", "completed")
    for name, value in {"prepare_on_ray": 1800.0, "run_trials": 3600.0, "run_finals": 7200.0}.items():
        monkeypatch.setattr(tune_search, name, lasts(value))
    monkeypatch.setattr(tune_search, "shape_there", lambda *_: tune_search.Shape(1, 1.0, 0.0, 1))
    monkeypatch.setattr(tune_search, "while_nodes_last", lambda *_: nullcontext())
    monkeypatch.setattr(driver_console, "joined", lambda *_: nullcontext(True))
    monkeypatch.setattr(search_line, "write_report", lambda *found: seen.append(found[3]))
    search_line.run(job, folder, configs, None)
    assert seen[:2] == [0.0, 0.5], "the budget of the trials begins with the preparation"
    assert (seen[-1], Clock(folder).hours) == (3.5, 3.5)


def test_a_search_that_cannot_be_run_overwrites_nothing(tmp_path: Path) -> None:
    trial = tmp_path / "s" / "trials" / "0000.json"
    trial.parent.mkdir(parents=True)
    trial.write_text("{}")
    (tmp_path / "s" / "config.json").write_text(json.dumps(to_dict(demo())))
    named = ["--run.root", str(tmp_path), "--run.name", "s", "--run.overwrite", "true"]
    assert main({"demo": _demo}, [*FLAGS, *named, "--cache.root", "nowhere", "--data.views", "2"]) == 2
    assert trial.exists()


def test_a_misspelt_flag_is_told_by_tyro(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*FLAGS, "--launch.backend", "local", "--run.root", str(tmp_path), "--search.trails", "3"]
    assert main({"demo": _demo}, arguments) == 2
    error = capsys.readouterr().err
    assert "Unrecognized options: --search.trails, 3" in error
    assert "--search.trials INT" in error


@pytest.mark.parametrize(
    ("changes", "cpus", "gpus", "expected"),
    [
        ({}, 2, 0, (1, 1.0, 0.0, 2)),
        ({}, 64, 8, (1, 8.0, 1.0, 8)),
        ({"gpus_per_trial": 0.25}, 64, 8, (1, 2.0, 0.25, 32)),
        ({"cpus_per_trial": 4.0}, 64, 0, (1, 4.0, 0.0, 16)),
        ({"workers": 2}, 2, 0, (2, 1.0, 0.0, 1)),
        ({"workers": 2}, 64, 8, (2, 8.0, 1.0, 4)),
        ({"concurrent": 9}, 2, 0, (1, 1.0, 0.0, 9)),
        ({"concurrent": 9, "scheduler": "pbt"}, 2, 0, (1, 1.0, 0.0, 2)),
    ],
)
def test_resources_are_derived_from_the_cluster(
    changes: dict[str, Any], cpus: int, gpus: int, expected: tuple[int, float, float, int]
) -> None:
    from mimkd_ray.on_ray.nodes.node_capacity import Capacity
    from mimkd_ray.on_ray.search.tune_search import shape_of

    job = search_job(_demo(), search=SearchConfig(**changes))
    assert tuple(shape_of(job, Capacity(((cpus, gpus),)))) == expected


@pytest.mark.parametrize(("wanted", "cpus", "loaders"), [(-1, 1.0, 0), (-1, 8.0, 7), (-1, 0.5, 0), (3, 1.0, 3)])
def test_a_trial_has_no_more_loader_processes_than_cpus(wanted: int, cpus: float, loaders: int) -> None:
    from mimkd_ray.on_ray.search.tune_trials import within

    config = replace(_demo(), data=replace(_demo().data, loader_workers=wanted))
    assert within(config, cpus).data.loader_workers == loaders


def test_a_trial_that_never_fits_is_refused() -> None:
    from mimkd_ray.on_ray.nodes.node_capacity import Capacity
    from mimkd_ray.on_ray.search.tune_search import shape_of

    job = search_job(_demo(), search=SearchConfig(cpus_per_trial=8))
    with pytest.raises(
        UserError, match=r"1 trial with 8 CPUs each do not fit: the cluster has 2 CPUs and 0 GPUs on 1 node: "
    ):
        shape_of(job, Capacity(((2, 0),)))
    asked = replace(job, search=replace(job.search, concurrent=1))  # of an autoscaler, which a Ray of our own has not
    assert shape_of(asked, Capacity(((2, 0),))).concurrent == 1
    with pytest.raises(UserError, match=r"on 1 node: pass fewer --search.cpus-per-trial or --search.workers$"):
        shape_of(asked, Capacity(((2, 0),)), own=True)
    on = replace(job, launch=replace(job.launch, gpu="on"), search=SearchConfig())
    with pytest.raises(UserError, match="and 1 GPU each do not fit: the cluster has 2 CPUs and 0 GPUs on 1 node:"):
        shape_of(on, Capacity(((2, 0),)))
