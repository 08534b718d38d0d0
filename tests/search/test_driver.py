"""The driver's view: what comes next, budgets, records at rest, restarts, and what comes out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from some_trials import read_trials
from tiny_search import figures, tiny_job, tiny_search

from mimkd_ray.config import Config, SearchConfig
from mimkd_ray.config.json_form import from_dict, to_dict
from mimkd_ray.errors import UserError
from mimkd_ray.json_files import read_json
from mimkd_ray.search.driver import Search, claim, final_config, trial_config
from mimkd_ray.search.finals import Finals
from mimkd_ray.search.spaces import SPACES
from mimkd_ray.search.suggest import find_spaces
from mimkd_ray.search.trial_folders import Ended
from mimkd_ray.search.trials import Trial

DONE = Ended(state="completed", seconds=2.0)


def write_eval(search: Search, number: int, epoch: int, top1: float) -> dict[str, Any]:
    """Write an evaluation to a trial's own log, and return it."""
    found = figures(epoch, top1)
    with (Path(search.place(number)) / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "eval", **found}) + "\n")
    return found


def run_one(search: Search, top1: float) -> int:
    (planned,) = search.next()
    for epoch in (1, 2):
        verdict = search.heard(planned.number, write_eval(search, planned.number, epoch, top1 + epoch))
        if verdict is not None:
            search.ended(planned.number, verdict)
            return planned.number
    search.ended(planned.number, DONE)
    return planned.number


def test_trials_share_the_recipe_and_hold_rows_out(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, {"optim": {"schedule": "step", "milestones": (10, 15), "warmup_epochs": 2.0}})
    job = replace(job, train=replace(job.train, epochs=20), search=replace(job.search, epochs=5))
    config = trial_config(job)
    assert (config.train.epochs, config.optim.milestones, config.optim.warmup_epochs) == (5, (2, 4), 0.5)
    short = trial_config(replace(job, search=replace(job.search, epochs=1)))
    assert short.optim.milestones == (1,), "half an epoch is none, three quarters are one"
    assert config.data.holdout == 0.3
    assert config.data.view_seed == job.view_seed
    assert type(config) is Config


def test_the_outcome_has_the_choice_and_the_recipes_own_length(tmp_path: Path) -> None:
    named = {"root": str(tmp_path), "name": "the-search", "overwrite": True}
    job = tiny_job(tmp_path, {"optim": {"schedule": "step", "milestones": (10, 15)}, "run": named}, epochs=5)
    job = replace(job, train=replace(job.train, epochs=20))
    chosen = trial_config(job)
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


def test_a_search_from_start_to_end(tmp_path: Path) -> None:
    search = tiny_search(tmp_path, trials=3, scheduler="none")
    assert [run_one(search, top1) for top1 in (10.0, 30.0, 20.0)] == [0, 1, 2]
    assert search.next() == []
    assert [trial.number for trial in search.ranked()] == [1, 2, 0]
    search.publish()
    trials, metric = read_trials(str(tmp_path / "search" / "trials.parquet"))
    assert metric == "top1"
    assert [(t.state, t.score, t.best_epoch, len(t.curve)) for t in trials] == [
        ("completed", top1 + 2, 2, 2) for top1 in (10.0, 30.0, 20.0)
    ]
    best = from_dict(Config, read_json(str(tmp_path / "search" / "best.json")))
    assert best.loss.critic.temperature == trials[1].params["critic.temperature"]


def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    """One trial is over and one has begun: the second is handed out again, and then new ones, as if nothing was."""
    search = tiny_search(tmp_path, trials=4, scheduler="none")
    run_one(search, 10.0)
    (begun,) = search.next()
    search.heard(begun.number, write_eval(search, begun.number, 1, 15.0))
    again = tiny_search(tmp_path, trials=4, scheduler="none")
    assert [trial.state for trial in again.trials.values()] == ["completed", "running"]
    assert again.trials[0] == search.trials[0]
    assert again.next() == [begun]
    assert again.heard(1, figures(1, 15.0)) is None, "an evaluation that was heard before the kill"
    again.heard(1, figures(2, 16.0))
    again.ended(1, DONE)
    assert again.trials[1].curve[-1].top1 == 16.0
    assert [run_one(again, 1.0), run_one(again, 2.0)] == [2, 3]
    assert again.next() == []
    params = [tuple(trial.params.items()) for trial in again.trials.values()]
    assert len(set(params)) == 4, "after a restart other values are drawn"


def test_a_search_on_object_storage_goes_on(bucket: str) -> None:
    """The same, with every record at an S3 URL."""
    job = tiny_job(bucket, trials=3, scheduler="none")
    spaces = find_spaces(job.search.space, SPACES)
    search = Search(job, f"{bucket}/search", spaces)
    (first,) = search.next()
    search.heard(0, figures(1, 7.0))
    search.ended(0, DONE)
    (second,) = search.next()
    search.publish()
    again = Search(job, f"{bucket}/search", spaces)
    assert [(t.state, t.params) for t in again.trials.values()] == [
        ("completed", first.params),
        ("running", second.params),
    ]
    assert again.next() == [second]
    assert read_trials(f"{bucket}/search/trials.parquet")[0][0].score == 7.0
    assert read_json(f"{bucket}/search/best.json")["recipe"] == "tiny"


def test_more_trials_may_be_added_and_nothing_else(tmp_path: Path) -> None:
    first = tiny_search(tmp_path, trials=1)
    run_one(first, 1.0)
    more = tiny_search(tmp_path, trials=2)
    assert run_one(more, 2.0) == 1
    with pytest.raises(UserError, match=r"begun with another configuration \(search.algorithm: tpe -> random\)"):
        tiny_search(tmp_path, trials=2, algorithm="random")
    with pytest.raises(UserError, match=r"train.lanes: 2 -> 1"):
        claim(tiny_job(tmp_path, {"train": {"lanes": 1}}), str(tmp_path / "search"))


def test_who_is_behind_is_stopped_and_says_why(tmp_path: Path) -> None:
    search = tiny_search(tmp_path, trials=2, grace=1, reduction=2)
    run_one(search, 50.0)
    run_one(search, 1.0)
    trial = search.trials[1]
    assert (trial.state, trial.kind, len(trial.curve)) == ("stopped", "early", 1)
    assert trial.reason == "top1 2 at epoch 1: one trial in 2 goes on past this rung"
    assert read_json(str(tmp_path / "search" / "trials" / "0001" / "ended.json"))["kind"] == "early"


def test_a_second_end_of_a_trial_is_ignored(tmp_path: Path) -> None:
    search = tiny_search(tmp_path)
    search.next()
    search.heard(0, figures(1, 5.0))
    search.ended(0, Ended(state="stopped", kind="early", reason="behind"))
    search.ended(0, DONE)
    assert search.heard(0, figures(2, 9.0)) is None
    assert (search.trials[0].state, search.trials[0].score) == ("stopped", 5.0)


def test_failed_and_stopped_trials_are_told_apart(tmp_path: Path) -> None:
    search = tiny_search(tmp_path, trials=3)
    search.next()
    search.ended(0, Ended(state="failed", kind="out of memory", reason="tried to allocate 3 TB"))
    search.next()
    search.ended(1, DONE)
    assert (search.trials[1].state, search.trials[1].kind) == ("failed", "non-finite"), "an end without a score"
    assert search.ranked() == []
    search.publish()
    assert not (tmp_path / "search" / "best.json").exists()
    again = tiny_search(tmp_path, trials=3)
    assert [(t.state, t.kind) for t in again.trials.values()] == [("failed", "out of memory"), ("failed", "non-finite")]


def test_hours_end_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("mimkd_ray.search.driver.time.monotonic", lambda: now[0])
    search = tiny_search(tmp_path, trials=0, hours=1.0, scheduler="none")
    search.next()
    assert search.heard(0, figures(1, 1.0)) is None
    now[0] += 1800
    search.ended(0, Ended(state="completed"))
    assert search.trials[0].seconds == 1800
    again = tiny_search(tmp_path, trials=0, hours=1.0, scheduler="none")
    (planned,) = again.next()
    now[0] += 1801
    verdict = again.heard(planned.number, figures(1, 2.0))
    assert verdict == Ended(state="stopped", kind="budget", reason="the budget is used up: 1.00 of 1 hours")
    again.ended(planned.number, verdict)
    assert again.next() == []
    assert tiny_search(tmp_path, trials=0, hours=2.0, scheduler="none").next(), "a larger budget goes on"


def test_gpu_hours_end_a_search(tmp_path: Path) -> None:
    search = tiny_search(tmp_path, trials=0, gpu_hours=1.0)
    search.next()
    search.heard(0, figures(1, 1.0))
    search.ended(0, Ended(state="completed", seconds=1800), gpus=2.0)
    assert search.spent()[1] == 1.0
    assert search.next() == []


def test_a_pack_is_handed_out_together_and_again(tmp_path: Path) -> None:
    search = tiny_search(tmp_path, trials=5, pack=3)
    first = search.next()
    assert [(each.number, each.pack) for each in first] == [(0, 0), (1, 0), (2, 0)]
    search.heard(1, figures(1, 3.0), alone=False)
    search.ended(1, Ended(state="stopped", kind="early", reason="behind", seconds=30.0), gpus=1.0)
    assert search._clock["gpu_seconds"] == 10.0, "a third of the pack's device"
    again = tiny_search(tmp_path, trials=5, pack=3)
    assert again.next() == first, "the whole pack goes on, whoever of it is over"
    again.ended(1, DONE)
    assert again.trials[1].state == "stopped"
    assert [each.number for each in again.next()] == [3, 4], "what is left of the budget"
    assert again.next() == []


def test_finals_choose_by_the_mean_of_new_seeds(tmp_path: Path) -> None:
    """The search's winner was lucky: over seeds the second is better, and is the outcome."""
    search = tiny_search(tmp_path, trials=3, scheduler="none", finalists=2, seeds=2)
    for top1 in (40.0, 50.0, 10.0):
        run_one(search, top1)
    finals = Finals(search)
    assert finals.runs == [(1, 1), (1, 2), (0, 1), (0, 2)]
    scores = {(1, 1): 41.0, (1, 2): 43.0, (0, 1): 46.0, (0, 2): 44.0}
    seeds = []
    while planned := finals.next():
        (each,) = planned
        config = from_dict(Config, each.config)
        seeds.append(config.train.seed)
        assert config.view_seed == search.base.view_seed
        assert config.data.holdout == search.base.data.holdout
        place = Path(finals.place(each.number))
        place.mkdir(parents=True)
        student = {"top1": scores[finals.runs[each.number]], "cross_entropy": 1.0}
        (place / "result.json").write_text(json.dumps({"student": student}))
        finals.ended(each.number, DONE)
    assert seeds == [1, 2, 1, 2], "seed 0 chose them"
    found = finals.publish()
    assert [(final.trial, final.mean) for final in found] == [(0, 45.0), (1, 42.0)]
    best = read_json(str(tmp_path / "search" / "best.json"))
    assert best["loss"]["critic"]["temperature"] == search.trials[0].params["critic.temperature"]
    assert best["train"]["seed"] == 0
    assert Finals(search).next() == [], "finished runs are not repeated"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "would never end"),
        ({"space": ()}, "space is empty"),
        ({"reduction": 1}, "reduction 1 at least 2"),
        ({"hours": -1.0}, "search.hours is -1.0"),
        ({"finalists": 1, "seeds": 0}, "search.seeds is 0"),
        ({"holdout": 1.0}, "search.holdout is 1.0"),
        ({"pack": 2, "workers": 2}, "only 1 to packs"),
    ],
)
def test_senseless_searches(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SearchConfig(**changes)


def test_a_search_without_a_held_out_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="never on the validation set"):
        tiny_job(tmp_path, holdout=0.0)


def test_a_worker_needs_a_lane(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"search.workers is 3 and train.lanes 2"):
        tiny_job(tmp_path, workers=3)


def test_a_trial_whose_log_was_cut_short_is_read(tmp_path: Path) -> None:
    search = tiny_search(tmp_path)
    search.next()
    write_eval(search, 0, 1, 7.0)
    with (Path(search.place(0)) / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval", "step": 6, "top1": 99')
    trial: Trial = tiny_search(tmp_path).trials[0]
    assert (trial.score, len(trial.curve)) == (7.0, 1)
