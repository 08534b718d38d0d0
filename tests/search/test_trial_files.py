"""The trials of a search at rest: what is written, read back after a kill, and published; finals on it."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from some_trials import read_trials
from tiny_search import figures, tiny_configs, tiny_job

from mimkd_ray.config import Config
from mimkd_ray.config.form.json_form import from_dict
from mimkd_ray.json_files import read_json
from mimkd_ray.search.finals import Finals
from mimkd_ray.search.summary import Clock, closing, ending
from mimkd_ray.search.trial_files import Table
from mimkd_ray.search.trials import Trial


def filled(folder: Path, tops: dict[str, float]) -> Table:
    """A search of trials with these names, that all came to their ends."""
    configs, table = tiny_configs(folder), Table(str(folder / "s"), "top1")
    for at, (name, top1) in enumerate(tops.items()):
        params = {"critic.learn_temperature": False, "critic.temperature": 0.1 * (at + 1)}
        table.begin(name, configs(params), params)
        for epoch in (1, 2):
            table.heard(name, {**figures(epoch, top1 + epoch), "time_total_s": 3.0 * epoch})
        table.ended(name, "completed")
    return table


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    table = filled(tmp_path, {"x": 10.0, "y": 30.0, "z/1": 20.0})
    again = Table(str(tmp_path / "s"), "top1")
    assert again.rows == table.rows
    assert [trial.number for trial in again.ranked()] == [1, 2, 0]
    file = tmp_path / "s" / "trials" / "0000.json"
    file.write_text(file.read_text().replace('"epoch"', '"seconds": 0.5, "epoch"'))
    assert Table(str(tmp_path / "s"), "top1").rows == table.rows, "of a version whose evaluations had a duration"
    job = tiny_job(tmp_path)
    again.publish(job)
    trials, metric = read_trials(str(tmp_path / "s" / "trials.parquet"))
    assert metric == "top1"
    assert [(t.state, t.score, t.best_epoch, len(t.curve), t.seconds) for t in trials] == [
        ("completed", top1 + 2, 2, 2, 6.0) for top1 in (10.0, 30.0, 20.0)
    ]
    best = from_dict(Config, read_json(str(tmp_path / "s" / "best.json")))
    assert best.loss.critic.temperature == trials[1].params["critic.temperature"] == 0.2
    first, *_, command = closing(again, 1.0).splitlines()
    assert first.startswith("3 trials: 3 completed")
    program, at, name = shlex.split(command)[-3:]
    assert (program, at, Path(name)) == ("train", "--config", tmp_path / "s" / "best.json")


def test_the_terminal_has_the_ends_of_a_long_reason() -> None:
    """The error of a loss that is not finite names 64 images before the remedy."""
    reason = "the loss is inf at step 2; sample ids " + ", ".join(map(str, range(1000, 1064))) + ": lower --optim.lr"
    trial = Trial(number=0, state="failed", params={}, kind="non-finite", reason=reason)
    shown = ending(trial, "top1")
    assert re.fullmatch(r"failed \(non-finite: the loss is inf at step 2; .* \.\.\. .*: lower --optim.lr\)", shown)
    assert len(shown) < 360 < len(reason)
    assert reason[:300] in ending(replace(trial, reason=reason[:300]), "top1")


def test_what_ray_tune_does_not_know_is_forgotten(tmp_path: Path) -> None:
    """A kill comes between our file and the state of Ray Tune: nothing waits for such a trial for ever."""
    filled(tmp_path, {"x": 10.0, "p/0": 1.0, "p/1": 1.0, "gone": 30.0, "gone2/0": 3.0})
    table = Table(str(tmp_path / "s"), "top1")
    table.keep({"x", "p", "y"})
    assert list(table.rows) == list(Table(str(tmp_path / "s"), "top1").rows) == ["x", "p/0", "p/1"]
    (tmp_path / "s" / "trials" / "0001.json").unlink()  # nor for one whose file is lost
    assert list(Table(str(tmp_path / "s"), "top1").rows) == ["x", "p/1"]


def test_a_trial_that_goes_on_repeats_an_epoch(tmp_path: Path) -> None:
    table = filled(tmp_path, {"x": 10.0})
    made = tiny_configs(tmp_path)({"critic.learn_temperature": False, "critic.temperature": 0.5})
    assert table.begin("x", made, {}).number == 0
    table.heard("x", figures(2, 5.0))
    row = table.rows["x"]
    assert (row.state, row.params["critic.temperature"]) == ("running", 0.5)
    assert [point.top1 for point in row.curve] == [11.0, 5.0]
    assert (row.score, row.best_epoch) == (11.0, 1)


def test_figures_that_are_no_numbers(tmp_path: Path) -> None:
    table = Table(str(tmp_path), "cross_entropy")
    table.begin("x", None, {"a": 1})
    table.heard("x", figures(1, 5.0) | {"cross_entropy": math.inf})
    table.ended("x", "completed")
    row = Table(str(tmp_path), "cross_entropy").rows["x"]
    assert (row.state, row.kind, row.score, row.params) == ("failed", "non-finite", None, {"a": 1})
    assert row.curve[0].cross_entropy == math.inf
    assert table.ranked() == []


def test_trials_without_labels_are_ranked_by_neighbours(tmp_path: Path) -> None:
    """Their heads are random: the best by top-1 is the worst by its features."""
    job = tiny_job(tmp_path, {"data": {"labels": "none"}}, metric="knn", finalists=1, seeds=2)
    table = Table(str(tmp_path / "s"), "knn")
    for name, top1, knn in (("x", 30.0, 50.0), ("y", 10.0, 70.0), ("z", 90.0, None)):
        table.begin(name, None, {})
        table.heard(name, figures(1, top1) | {"knn": knn})
        table.ended(name, "completed")
    again = Table(str(tmp_path / "s"), "knn")
    assert [(trial.number, trial.score) for trial in again.ranked()] == [(1, 70.0), (0, 50.0)]
    assert again.rows["z"].reason == "no finite knn"
    again.publish(job)
    assert [trial.curve[0].knn for trial in read_trials(str(tmp_path / "s" / "trials.parquet"))[0]] == [
        50.0,
        70.0,
        None,
    ]
    runs = {run: figures(2, 1.0) | {"knn": 60.0 + run} for run in range(2)}
    assert [(final.trial, final.top1) for final in Finals(job, again).publish(job, str(tmp_path), runs)] == [
        (1, (60.0, 61.0))
    ]


def test_a_table_on_object_storage(bucket: str, tmp_path: Path) -> None:
    made = tiny_configs(tmp_path)({"critic.learn_temperature": True, "critic.temperature": 0.5})
    table = Table(f"{bucket}/s", "top1")
    table.begin("x", made, made.params)
    table.heard("x", figures(1, 7.0))
    table.ended("x", "stopped", "early", "behind")
    table.publish(tiny_job(bucket))
    assert Table(f"{bucket}/s", "top1").rows == table.rows
    assert read_trials(f"{bucket}/s/trials.parquet")[0][0].score == 7.0
    assert read_json(f"{bucket}/s/best.json")["recipe"] == "tiny"


def test_hours_add_up_over_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("mimkd_ray.search.summary.time.monotonic", lambda: now[0])
    clock = Clock(str(tmp_path))
    now[0] += 1800
    clock.save()
    again = Clock(str(tmp_path))
    now[0] += 3600
    assert (again.hours, again.finished) == (1.5, None)
    again.save("finals-1")
    assert Clock(str(tmp_path)).finished == "finals-1"


def test_finals_choose_by_the_mean_of_new_seeds(tmp_path: Path) -> None:
    """The search's winner was lucky: over seeds the second is better, and is the outcome."""
    table = filled(tmp_path, {"x": 40.0, "y": 50.0, "z": 10.0})
    job = tiny_job(tmp_path, finalists=2, seeds=2)
    finals = Finals(job, table)
    assert finals.runs == [(1, 1), (1, 2), (0, 1), (0, 2)]
    configs = [finals({"run": number}).config for number in range(4)]
    assert [config.train.seed for config in configs] == [1, 2, 1, 2], "seed 0 chose them"
    assert {config.view_seed for config in configs} == {job.view_seed}
    assert {config.data.holdout for config in configs} == {0.3}
    folder = str(tmp_path / "s")
    tops = dict(enumerate((41.0, 43.0, 46.0, 44.0)))
    found = finals.publish(job, folder, {run: figures(2, top1) for run, top1 in tops.items()})
    assert [(final.trial, final.seeds, final.mean) for final in found] == [(0, (1, 2), 45.0), (1, (1, 2), 42.0)]
    best = read_json(f"{folder}/best.json")
    assert (best["loss"]["critic"]["temperature"], best["train"]["seed"]) == (0.1, 0)
    assert Finals(job, table).name == finals.name
    assert Finals(replace(job, search=replace(job.search, seeds=1)), table).name != finals.name
    table.publish(job)
    assert read_json(f"{folder}/best.json") == best, "the finalist's, also when the search is given again"
    table.publish(replace(job, search=replace(job.search, finalists=0)))
    assert read_json(f"{folder}/best.json")["loss"]["critic"]["temperature"] == 0.2
    failed = figures(2, 0.0) | {"failed": "error"}
    whole = {2: figures(2, 0.0), 3: figures(2, 4.0)}
    assert [final.trial for final in finals.publish(job, folder, {0: figures(2, 9.0), 1: failed, **whole})] == [0]
    assert finals.publish(job, folder, {0: figures(2, 41.0)}) == [], "a finalist with a failed run is left out"
