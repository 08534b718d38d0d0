"""The journal of a search and its budget, as Ray Tune calls them; no Ray is started."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_search import figures, tiny_configs, tiny_job

from mimkd_ray import console
from mimkd_ray.config import SearchJob
from mimkd_ray.errors import UserError
from mimkd_ray.search.configs import claim
from mimkd_ray.search.trial_files import Table

VALUES = {"critic.learn_temperature": False, "critic.temperature": 0.5}


def journal_of(folder: Path, job: SearchJob) -> Any:
    """A journal whose trials have two GPUs."""
    from mimkd_ray.on_ray.search.search_journal import Journal

    claim(job, str(folder / "s"))
    return Journal(job, str(folder / "s"), tiny_configs(folder), 2.0, 3)


def test_gpu_hours_count_after_a_restore(tmp_path: Path) -> None:
    """Tune pickles the budget apart from the callbacks, and tells it results only."""
    journal = journal_of(tmp_path, tiny_job(tmp_path, gpu_hours=2.0))
    trial = SimpleNamespace(trial_id="x", config=VALUES)
    journal.on_trial_start(0, [trial], trial)
    result = {**figures(1, 50.0), "time_total_s": 1800.0}
    assert not journal("x", result)
    journal.on_trial_result(0, [trial], trial, result)
    assert not journal.stop_all(), "two GPUs for half an hour are one of two GPU hours"
    again = pickle.loads(pickle.dumps(journal))  # noqa: S301
    assert not again.stop_all()
    again("y", {"time_total_s": 1900.0})
    assert again.stop_all()
    assert again.over_budget() == "the budget is used up: 2.06 of 2 gpu_hours"


def test_the_console_tells_the_metric_and_how_far_the_search_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(console, "show", shown.append)
    journal = journal_of(tmp_path, tiny_job(tmp_path, metric="cross_entropy"))
    trials = [SimpleNamespace(trial_id=name, config=VALUES) for name in "xy"]
    for trial in trials:
        journal.on_trial_start(0, trials, trial)
    journal.on_trial_result(0, trials, trials[0], {**figures(2, 50.0), "cross_entropy": 1.25, "time_total_s": 1.0})
    journal.on_trial_complete(0, trials, trials[0])
    assert "trial 0: epoch 2, cross-entropy 1.25\n" in capsys.readouterr().out
    far = "search of tpe: 1 of 3 trials, 1 running, best cross_entropy 1.25"
    assert shown[-1].text() == far
    shown.clear()
    again = pickle.loads(pickle.dumps(journal))  # noqa: S301
    again.on_step_begin(0, trials)
    assert [status.text() for status in shown] == [far], "a restored search tells it before any trial ends"


def test_values_that_no_epoch_was_trained_with_are_not_a_members(tmp_path: Path) -> None:
    """Tune gives a member of a population another one's weights and new values after its last epoch too."""
    journal = journal_of(tmp_path, tiny_job(tmp_path, scheduler="pbt"))
    trial = SimpleNamespace(trial_id="x", config=VALUES)
    journal.on_trial_start(0, [trial], trial)
    others, new = VALUES | {"critic.temperature": 0.2}, VALUES | {"critic.temperature": 0.25}
    told = {**figures(1, 50.0), "time_total_s": 1.0, "schedule": json.dumps([[1, VALUES]])}
    journal.on_trial_result(0, [trial], trial, told)
    trial.config = new
    journal.on_trial_start(0, [trial], trial)
    told = {**figures(2, 60.0), "time_total_s": 2.0, "schedule": json.dumps([[2, others], [2, new]])}
    journal.on_trial_result(0, [trial], trial, told)
    (row,) = Table(str(tmp_path / "s"), "top1").trials()
    assert (row.params, row.schedule) == (others, ((2, others),))
    assert row.config["loss"]["critic"]["temperature"] == 0.2
    assert (row.score, row.state) == (60.0, "running")


@pytest.mark.parametrize(("changes", "concurrent"), [({}, 3), ({"pack": 2}, 3), ({"scheduler": "pbt"}, None)])
def test_as_many_trials_or_packs_at_a_time_as_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], concurrent: int | None
) -> None:
    from mimkd_ray.on_ray.search import tune_search

    def experiment(folder: str, name: str, trial: Any, space: Any, how: Any, run: Any) -> Any:
        assert how.max_concurrent_trials == concurrent
        raise KeyboardInterrupt

    monkeypatch.setattr(tune_search, "experiment", experiment)
    job, shape = tiny_job(tmp_path, **changes), tune_search.Shape(1, 1.0, 0.0, 3)
    with pytest.raises(KeyboardInterrupt):
        tune_search.run_trials(job, str(tmp_path / "s"), tiny_configs(tmp_path), None, shape, True)


@pytest.mark.parametrize("pack", [False, True])
def test_the_time_of_a_failed_trial_counts(tmp_path: Path, pack: bool) -> None:
    journal = journal_of(tmp_path, tiny_job(tmp_path, gpu_hours=1.0))
    trial = SimpleNamespace(trial_id="x", config={"pack": 0} if pack else VALUES)
    journal.on_trial_start(0, [trial], trial)
    result = {"failed": "error", "reason": "it broke", "time_total_s": 2000.0, "drawn": "[{}]"}
    journal.on_trial_result(0, [trial], trial, result)
    (row,) = Table(str(tmp_path / "s"), "top1").trials()
    assert (row.state, row.seconds) == ("failed", 2000.0)
    assert "1.11 of 1 gpu_hours" in journal.over_budget()


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("mimkd_ray.search.optuna_study\nDefineByRun", r"by another version, .*DefineByRun.* --run.overwrite true$"),
        ("mimkd_ray.search.gone\nDefineByRun", r"by another version, .*mimkd_ray.search.gone.* --run.overwrite true$"),
        ("my_spaces\nwidth", r"needs module my_spaces as .*No module named.*: start in the folder in which [^-]*$"),
        ("tiny_search\ngone", r"needs module tiny_search as it was .*'gone'.*: start in the folder in which [^-]*$"),
    ],
)
def test_a_state_that_cannot_be_read_is_told(tmp_path: Path, named: str, told: str) -> None:
    """It names a class or a module that is not there: of another version, or the user's."""
    from ray import tune

    from mimkd_ray.on_ray.search import tune_search

    place = tmp_path / "tune"
    place.mkdir()
    (place / "experiment_state-1.json").write_text('{"trial_data": [1]}')
    (place / "tuner.pkl").write_bytes(f"c{named}\n.".encode())
    with pytest.raises(UserError, match=told):
        tune_search.experiment(str(tmp_path), "tune", print, None, tune.TuneConfig(), tune.RunConfig())
