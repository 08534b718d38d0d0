"""From a search to its trials' configs and back, what may change between two starts, and senseless searches."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_search import tiny_configs, tiny_job

from mimkd_ray.config import Config, SearchConfig
from mimkd_ray.config.form.json_form import dotted, from_dict, to_dict
from mimkd_ray.errors import UserError
from mimkd_ray.search.configs import FieldConfigs, TrialConfigs, claim, final_config, trial_config
from mimkd_ray.search.spaces import find_spaces
from mimkd_ray.train.trained_teacher import teacher_config


def test_trials_share_the_recipe_and_hold_rows_out(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, {"optim": {"schedule": "step", "milestones": (10, 15), "warmup_epochs": 2.0}})
    job = replace(job, train=replace(job.train, epochs=20), search=replace(job.search, epochs=5))
    config = trial_config(job, job.search)
    assert (config.train.epochs, config.optim.milestones, config.optim.warmup_epochs) == (5, (2, 4), 0.5)
    short = trial_config(job, replace(job.search, epochs=1))
    assert short.optim.milestones == (1,), "half an epoch is none, three quarters are one"
    assert config.data.holdout == 0.3
    assert config.data.view_seed == job.view_seed
    assert type(config) is Config


def test_the_outcome_has_the_choice_and_the_recipes_own_length(tmp_path: Path) -> None:
    named = {"root": str(tmp_path), "name": "the-search", "overwrite": True}
    job = tiny_job(tmp_path, {"optim": {"schedule": "step", "milestones": (10, 15)}, "run": named}, epochs=5)
    job = replace(job, train=replace(job.train, epochs=20))
    chosen = trial_config(job, job.search)
    chosen = replace(
        chosen,
        optim=replace(chosen.optim, lr=0.5),
        loss=replace(chosen.loss, feature_weight=3.0, critic=replace(chosen.loss.critic, temperature=0.4)),
    )
    final = from_dict(Config, final_config(job, to_dict(chosen)))
    assert final.data.holdout == 0
    assert (final.train.epochs, final.optim.milestones, final.optim.lr) == (20, (10, 15), 0.5)
    assert (final.loss.feature_weight, final.loss.critic.temperature) == (3.0, 0.4)
    assert (final.run.root, final.run.name, final.run.overwrite) == (str(tmp_path), "", False), "not in the search's"


def test_the_students_rate_is_not_that_of_a_teacher_which_is_trained_first(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, {"teacher": {"train": True}, "optim": {"lr": 0.05}}, space=("rate",))
    configs = TrialConfigs(trial_config(job, job.search), find_spaces(job.search.space))
    chosen = configs({"lr": 0.2}).config
    assert chosen.optim.lr == 0.2
    for config in (configs.widest(), chosen, from_dict(Config, final_config(job, to_dict(chosen)))):
        assert teacher_config(config).optim.lr == 0.05


def test_a_trial_has_what_its_values_say(tmp_path: Path) -> None:
    """Also after pickling, as Ray does; values that do not count in it are left out, and those beyond a range are at
    its end."""
    configs = pickle.loads(pickle.dumps(tiny_configs(tmp_path)))  # noqa: S301
    values = {"critic.learn_temperature": False, "critic.temperature": 7.0, "kd": True}
    made = configs(values)
    assert (made.config.loss.critic.temperature, made.config.loss.critic.learn_temperature) == (1.0, False)
    assert made.params == {"critic.learn_temperature": False, "critic.temperature": 1.0}
    with pytest.raises(UserError, match=r"asks for 'critic.temperature', and the trial has only critic.learn"):
        configs({"critic.learn_temperature": False})
    with pytest.raises(UserError, match=r"offers \[True, False\] for 'critic.learn_temperature', and the trial has 3"):
        configs(values | {"critic.learn_temperature": 3})


def test_fields_by_their_names(tmp_path: Path) -> None:
    configs = FieldConfigs(trial_config(tiny_job(tmp_path), SearchConfig()))
    made = configs({"optim": {"lr": 0.5}, "loss.critic.temperature": 0.4})
    assert (made.config.optim.lr, made.config.loss.critic.temperature) == (0.5, 0.4)
    assert made.params == {"optim.lr": 0.5, "loss.critic.temperature": 0.4}
    with pytest.raises(UserError, match=r"'optim.lrr' is no field of a config; did you mean 'optim.lr'"):
        configs({"optim.lrr": 0.5})
    with pytest.raises(UserError, match=r"'optim.lr.x' is no field"):
        configs({"optim.lr.x": 0.5})


def test_the_names_of_a_space_are_checked_before_its_trials() -> None:
    """A Tune space of which only the names are known."""
    configs = FieldConfigs(Config())
    configs.check(dict(dotted({"optim": {"lr": object()}, "loss.kd_weight": [0.1, 1.0]})))
    with pytest.raises(UserError, match=r"'loss.kd_weigth' is no field of a config; did you mean 'loss.kd_weight'"):
        configs.check({"loss.kd_weigth": [0.1, 1.0]})


def test_another_search_does_not_go_on_in_the_same_folder(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    claim(job, str(tmp_path / "s"))
    claim(replace(job, search=replace(job.search, hours=3.0, finalists=1)), str(tmp_path / "s"))
    file = tmp_path / "s" / "config.json"
    begun = json.loads(file.read_text())
    del begun["search"]["reduction"], begun["loss"]["symmetric"]  # as before there were these fields
    file.write_text(json.dumps(begun))
    claim(job, str(tmp_path / "s"))
    with pytest.raises(UserError, match=r"begun with another configuration \(search.algorithm: tpe -> random\)"):
        claim(replace(job, search=replace(job.search, algorithm="random")), str(tmp_path / "s"))
    with pytest.raises(UserError, match=r"train.lanes: 2 -> 1"):
        claim(tiny_job(tmp_path, {"train": {"lanes": 1}}), str(tmp_path / "s"))
    with pytest.raises(UserError, match=r"data.val_rows: 0 -> 20; train.eval_every: 1 -> 2"):
        claim(tiny_job(tmp_path, {"data": {"val_rows": 20}, "train": {"eval_every": 2}}), str(tmp_path / "s"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_dict(Config())))
    with pytest.raises(
        UserError, match=r"run is no search's: its config.json has no 'search'; pass another --run.name"
    ):
        claim(job, str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "would never end"),
        ({"space": ()}, "space is empty"),
        ({"reduction": 1}, "search.reduction is 1: give 2 or more"),
        ({"hours": -1.0}, "search.hours is -1.0"),
        ({"finalists": 1, "seeds": 0}, "search.seeds is 0"),
        ({"holdout": 1.0}, "search.holdout is 1.0"),
        ({"pack": 2, "workers": 2}, "a pack trains in one process"),
        ({"algorithm": "hyperop"}, "search.algorithm 'hyperop' is unknown; did you mean 'hyperopt'"),
        ({"algorithm": "bohb"}, "bohb goes with --search.scheduler hyperband, and it is asha"),
        ({"algorithm": "grid", "scheduler": "pbt"}, "draws its population itself, and search.algorithm is grid"),
        ({"trials": 0, "hours": 1.0, "scheduler": "pb2"}, "size of its population"),
        ({"pack": 2, "scheduler": "hyperband"}, "a pack halves by itself"),
        ({"pack": 2, "algorithm": "ax"}, "a pack halves by itself"),
        ({"workers": 2, "scheduler": "pbt"}, "moves checkpoints between trials"),
    ],
)
def test_senseless_searches(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SearchConfig(**changes)


def test_a_search_without_a_held_out_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="never on the validation set"):
        tiny_job(tmp_path, holdout=0.0)


def test_a_search_of_broken_epochs_is_refused(tmp_path: Path) -> None:
    """The table would call a trial stopped that came to its end, and a pack would halve there."""
    with pytest.raises(UserError, match=r"train.max_steps is 4, and trials end after whole epochs"):
        tiny_job(tmp_path, {"train": {"max_steps": 4}})


@pytest.mark.parametrize("scheduler", ["asha", "pbt"])
def test_a_scheduler_acts_within_the_epochs_of_a_trial(tmp_path: Path, scheduler: str) -> None:
    with pytest.raises(
        UserError, match=f"grace is 3, and a trial has 2 epochs: search.scheduler {scheduler} would do no"
    ):
        tiny_job(tmp_path, scheduler=scheduler, epochs=2, grace=3)
    assert tiny_job(tmp_path, scheduler="none", epochs=2, grace=3).search.grace == 3


def test_a_search_by_neighbours_is_one_without_labels(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"search.metric is knn, .*data.labels is all"):
        tiny_job(tmp_path, metric="knn")


def test_a_worker_needs_a_lane(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"search.workers is 3 and train.lanes 2"):
        tiny_job(tmp_path, workers=3)


def test_hyperparameters_that_would_change_nothing_are_refused(tmp_path: Path) -> None:
    configs = FieldConfigs(trial_config(tiny_job(tmp_path), SearchConfig()))
    for name in ("launch.workers", "run.name", "compare.seeds"):
        with pytest.raises(UserError, match=f"^hyperparameter '{name}' would change nothing: trials are "):
            configs({name: 2})
    spaces = tiny_configs(tmp_path, "temperature")
    spaces.check(["critic.temperature", "critic.learn_temperature"])
    with pytest.raises(
        UserError, match=r"'optim.lr' is asked for by no space \(they ask for critic.learn_temperature, "
    ):
        spaces.check(["critic.temperature", "optim.lr"])


def test_numpy_scalars_are_numbers(tmp_path: Path) -> None:
    """As people draw them: tune.choice(np.arange(8, 17)), and as some searchers do."""
    made = FieldConfigs(trial_config(tiny_job(tmp_path), SearchConfig()))(
        {"loss.critic.width": np.int64(8), "optim": {"lr": np.float32(0.5)}, "optim.nesterov": np.bool_(True)}
    )
    assert (made.config.loss.critic.width, made.config.optim.lr, made.config.optim.nesterov) == (8, 0.5, True)
    assert json.loads(json.dumps(made.params)) == {"loss.critic.width": 8, "optim.lr": 0.5, "optim.nesterov": True}
    drawn = tiny_configs(tmp_path, "tiny_search:width")({"width": np.int64(16)})
    assert json.dumps(drawn.params) == '{"width": 16}'
