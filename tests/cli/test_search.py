"""jobs/search.py under Ray Tune: killed in every way and given again, with failing trials, packs and large trials."""

from __future__ import annotations

import json
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs_here import ENVIRONMENT, JOB, ROOT, TAKES_MINUTES, Job, kill, processes, read_lines, run
from some_trials import read_trials

from mimkd_ray.cli.search import main
from mimkd_ray.config import Config, SearchConfig
from mimkd_ray.config.json_form import from_dict, to_dict
from mimkd_ray.config.search import search_job
from mimkd_ray.errors import UserError
from mimkd_ray.recipes import demo
from mimkd_ray.search.run_trials import run_trials
from mimkd_ray.search.spaces import SPACES
from mimkd_ray.search.trial_folders import Planned

# Digits, a random teacher, trials of three epochs of four steps.
FLAGS = (
    *("demo", "--teacher.train", "false", "--teacher.name", "cifar/resnet8", "--data.subset", "80"),
    *("--train.lanes", "2", "--train.lane-batch", "10", "--train.eval-batch", "150", "--train.information-rows", "50"),
    *("--loss.critic.width", "16", "--search.epochs", "3", "--search.holdout", "0.2", "--search.finalists", "0"),
)


def command(root: Path, *more: str) -> list[str]:
    job = str(ROOT / "jobs" / "search.py")
    return [sys.executable, job, *FLAGS, "--run.root", str(root), "--run.name", "s", *more]


def ended(root: Path) -> dict[int, dict[str, Any]]:
    files = sorted((root / "s" / "trials").glob("*/ended.json"))
    return {int(file.parent.name): json.loads(file.read_text()) for file in files}


def trial_processes(root: int) -> list[int]:
    """Processes below ``root`` in which Ray Tune trains."""
    return processes(root, "ImplicitFunc")


@pytest.mark.ray
@pytest.mark.slow
def test_killed_trials_and_a_killed_search(tmp_path: Path) -> None:
    """SIGKILL of the trials' processes, which Tune starts again, then of the whole job; then SIGTERM; given again it
    ends. A trial that was killed ends with the weights of one that was not."""
    long = ("--search.trials", "6", "--search.scheduler", "none", "--search.algorithm", "random")
    long = (*long, "--search.epochs", "40")
    job = Job(command(tmp_path, *long), tmp_path / "log")
    first = tmp_path / "s" / "trials" / "0000"
    job.wait_until(lambda: len(read_lines(first / "metrics.jsonl")) >= 4)
    victims = trial_processes(job.process.pid)
    assert victims
    kill(victims)
    job.wait_until(lambda: len(ended(tmp_path)) >= 2)
    job.kill()
    over = len(ended(tmp_path))
    assert 2 <= over < 6
    job = Job(command(tmp_path, *long), tmp_path / "log2")
    job.wait_until(lambda: "epoch" in (tmp_path / "log2").read_text())
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 3, "it ends in good order, and can go on"
    assert "asked to stop" in (tmp_path / "log2").read_text()
    text = run(command(tmp_path, *long))
    assert "trials have ended before" in text
    assert [(each["state"], each["kind"]) for each in ended(tmp_path).values()] == [("completed", "")] * 6
    trials, _ = read_trials(str(tmp_path / "s" / "trials.parquet"))
    assert [[point.epoch for point in trial.curve] for trial in trials] == [list(range(1, 41))] * 6
    assert (first / "best.safetensors").exists()

    config = from_dict(Config, trials[0].config)
    planned = [Planned(0, 0, trials[0].params, trials[0].config)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    twin = str(tmp_path / "twin")
    run_trials(SearchConfig(), planned, str(tmp_path / "s"), {0: twin}, torch.device("cpu"), lambda _: None)
    torch.set_num_threads(threads)
    assert (first / "student.safetensors").read_bytes() == (Path(twin) / "student.safetensors").read_bytes()
    assert config.train.seed == 0


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_whose_process_is_lost_for_good_is_recorded(tmp_path: Path) -> None:
    """Killed more often than it may be: it has failed, with what Ray says of it, and the other trial goes on."""
    flags = ("--search.trials", "2", "--search.retries", "0", "--search.scheduler", "none", "--search.epochs", "60")
    job = Job(command(tmp_path, *flags), tmp_path / "log")
    first = tmp_path / "s" / "trials" / "0000"
    job.wait_until(lambda: (first / "best.json").exists() and trial_processes(job.process.pid))
    kill(trial_processes(job.process.pid)[:1])
    assert job.end() == 0
    lost, whole = sorted(ended(tmp_path).values(), key=lambda each: each["state"] == "completed")
    assert (lost["state"], lost["kind"]) == ("failed", "lost")
    assert "process" in lost["reason"]
    assert "died" in lost["reason"]
    assert whole["state"] == "completed"
    assert "Tuner.restore" not in (tmp_path / "log").read_text(), "nobody can: Tune's state is thrown away"


@pytest.mark.ray
@pytest.mark.slow
def test_failures_stops_finals_and_what_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid with trials that run out of memory or explode: the search ends well, and says so of each."""
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{ROOT}/tests/search:{ROOT}/tests:{ROOT}")
    options = ("--search.space", "tiny_search:unlucky", "rate", "--search.algorithm", "grid", "--search.points", "2")
    finals = ("--search.finalists", "1", "--search.seeds", "2")
    text = run(command(tmp_path, *options, *finals))
    states = [(each["state"], each["kind"]) for each in ended(tmp_path).values()]
    assert sorted(states[1:3] + states[4:6]) == [("failed", "non-finite")] * 2 + [("failed", "out of memory")] * 2
    assert {states[0][0], states[3][0]} <= {"completed", "stopped"}
    assert "finalists: trials" in text
    finals_file = json.loads((tmp_path / "s" / "finals.json").read_text())
    assert len(finals_file["finals"][0]["seeds"]) == 2
    report = (tmp_path / "s" / "report.html").read_text()
    assert "out of memory" in report
    again = run(command(tmp_path, *options, *finals))
    assert "6 trials:" in again, "a finished search prints its outcome"
    assert "trial 0: lr" not in again, "and repeats nothing"
    printed = run([sys.executable, JOB, "demo", "--config", str(tmp_path / "s" / "best.json"), "--print-config"])
    assert json.loads(printed)["data"]["holdout"] == 0


@pytest.mark.ray
@pytest.mark.slow
def test_packs_under_tune_are_the_lone_trials(tmp_path: Path) -> None:
    """The same four configurations in packs of two and alone: the same weights."""
    flags = ("--search.trials", "4", "--search.scheduler", "none", "--search.algorithm", "random")
    run(command(tmp_path / "pack", *flags, "--search.pack", "2"))
    for place in ended(tmp_path / "pack"):
        folder = tmp_path / "pack" / "s" / "trials" / f"{place:04d}"
        begun = json.loads((folder / "trial.json").read_text())
        assert begun["pack"] == place // 2 * 2
        planned = [Planned(place, place, begun["params"], begun["config"])]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        twin = tmp_path / f"twin{place}"
        run_trials(
            SearchConfig(), planned, str(tmp_path / "s"), {place: str(twin)}, torch.device("cpu"), lambda _: None
        )
        torch.set_num_threads(threads)
        assert (folder / "student.safetensors").read_bytes() == (twin / "student.safetensors").read_bytes()
    assert len(ended(tmp_path / "pack")) == 4


@TAKES_MINUTES
@pytest.mark.ray
@pytest.mark.slow
def test_trials_of_two_workers_are_stopped_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trial takes all CPUs. The second learns nothing: it is asked to end, and the third finds all CPUs free."""
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{ROOT}/tests/search:{ROOT}/tests:{ROOT}")
    flags = ("--search.workers", "2", "--search.algorithm", "grid", "--search.reduction", "2", "--search.epochs", "60")
    text = run(command(tmp_path, *flags, "--search.space", "tiny_search:slow_second"))
    assert "1 at a time, 2 workers with 1 CPUs each a trial" in text
    found = ended(tmp_path)
    assert [each["state"] for each in found.values()][:2] == ["completed", "stopped"]
    assert len(found) == 3
    trials, _ = read_trials(str(tmp_path / "s" / "trials.parquet"))
    assert trials[0].curve[-1].epoch == 60
    assert trials[1].curve[-1].epoch < 60
    assert trials[2].curve
    assert json.loads((tmp_path / "s" / "trials" / "0000" / "result.json").read_text())["workers"] == 2


def test_a_search_without_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, one trial after the other; the whole command line."""
    flags = [*FLAGS, "--launch.backend", "local", "--run.root", str(tmp_path), "--run.name", "s"]
    recipes = {"demo": _demo}
    assert main(recipes, SPACES, [*flags, "--search.trials", "3", "--search.pack", "2"]) == 0
    out = capsys.readouterr().out
    assert "candidate pairs of the feature terms: stage3:stage3" in out
    assert len(ended(tmp_path)) == 3
    assert (tmp_path / "s" / "best.json").exists()
    assert main(recipes, SPACES, [*flags, "--search.trials", "3", "--search.pack", "1"]) == 2
    assert "search.pack: 2 -> 1" in capsys.readouterr().err


def _demo() -> Config:
    """Digits."""
    return demo()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--search.space", "tempreature"], "search.space 'tempreature' is unknown"),
        (["--search.trials", "0"], "would never end"),
        (["--cache.root", "nowhere", "--data.views", "2"], "the cache .*nowhere does not fit this run"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    arguments = [*FLAGS, "--launch.backend", "local", "--run.root", str(tmp_path), *flags]
    assert main({"demo": _demo}, SPACES, arguments) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1


def test_a_misspelt_flag_is_told_by_tyro(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*FLAGS, "--launch.backend", "local", "--run.root", str(tmp_path), "--search.trails", "3"]
    assert main({"demo": _demo}, SPACES, arguments) == 2
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
    ],
)
def test_resources_are_derived_from_the_cluster(
    changes: dict[str, Any], cpus: int, gpus: int, expected: tuple[int, float, float, int]
) -> None:
    from mimkd_ray.on_ray.node_capacity import Capacity
    from mimkd_ray.on_ray.tune_driver import shape_of

    job = search_job(_demo(), search=SearchConfig(**changes))
    assert tuple(shape_of(job, Capacity(((cpus, gpus),)))) == expected


@pytest.mark.parametrize(("wanted", "cpus", "loaders"), [(-1, 1.0, 0), (-1, 8.0, 7), (-1, 0.5, 0), (3, 1.0, 3)])
def test_a_trial_has_no_more_loader_processes_than_cpus(wanted: int, cpus: float, loaders: int) -> None:
    from mimkd_ray.on_ray.trial_actor import within

    config = to_dict(replace(_demo(), data=replace(_demo().data, loader_workers=wanted)))
    assert within(Planned(0, 0, {}, config), cpus).config["data"]["loader_workers"] == loaders


def test_a_trial_that_never_fits_is_refused() -> None:
    from mimkd_ray.on_ray.node_capacity import Capacity
    from mimkd_ray.on_ray.tune_driver import shape_of

    job = search_job(_demo(), search=SearchConfig(cpus_per_trial=8))
    with pytest.raises(UserError, match=r"takes 8 CPUs and 0 GPUs, and the cluster has 2 and 0 on 1 nodes"):
        shape_of(job, Capacity(((2, 0),)))
    on = replace(job, launch=replace(job.launch, gpu="on"), search=SearchConfig())
    with pytest.raises(UserError, match="1 GPUs, and the cluster has 2 and 0 on 1 nodes"):
        shape_of(on, Capacity(((2, 0),)))
