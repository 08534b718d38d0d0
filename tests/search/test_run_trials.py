"""Trials in a process: alone and in a pack, with their failures told apart; another trial's checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import cpu
from tiny_search import tiny_job, wild

from mimkd_ray.config import Config, SearchJob
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.errors import UserError
from mimkd_ray.json_files import read_json
from mimkd_ray.search import run_trials
from mimkd_ray.search.configs import trial_config
from mimkd_ray.search.run_trials import explain, failures_told, prepare, taught, train_members, train_trial
from mimkd_ray.train.distributed import Context
from mimkd_ray.train.job import obtain_teacher
from mimkd_ray.train.loop import train
from mimkd_ray.train.records import checkpoint
from mimkd_ray.train.records.outcomes import Finished, Outcome, Stopped

CPU = torch.device("cpu")


def with_lr(config: Config, lr: float) -> Config:
    return replace(config, optim=replace(config.optim, lr=lr))


def run(folder: Path, job: SearchJob, config: Config, tell: Any = lambda _: None) -> dict[str, Any]:
    """Train a trial in ``folder``/trial, and return what was told last."""
    last: dict[str, Any] = {}

    def telling(figures: Mapping[str, Any]) -> None:
        last.clear()
        last.update(figures)
        tell(figures)

    with failures_told(telling) as told:
        train_trial(config, str(folder), str(folder / "trial"), CPU, told)
    return last


def run_pack(folder: Path, job: SearchJob, configs: list[Config]) -> tuple[dict[int, list[str]], list[Any]]:
    """Train members in ``folder``/pack, and return their ends and all that was told."""
    told: list[Any] = []
    train_members(job.search, configs, str(folder), str(folder / "pack"), CPU, told.append)
    ended: dict[int, list[str]] = {}
    for each in told:
        ended |= {int(at): end for at, end in json.loads(each["members"])["ended"].items()}
    return ended, told


def test_a_lone_trial_reports_what_is_committed(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    place = tmp_path / "trial"
    heard: list[Mapping[str, Any]] = []

    def tell(figures: Mapping[str, Any]) -> None:
        heard.append(dict(figures))
        folders = list((place / "checkpoints").glob("*/committed.json"))
        assert folders or figures["epoch"] == 2, "a worker may be ended in a report, and the folder is its checkpoint"
        assert (figures["epoch"] == 2) == (place / "result.json").exists()
        assert read_json(str(place / "best.json"))["top1"] == max(each["top1"] for each in heard)

    last = run(tmp_path, job, trial_config(job, job.search), tell)
    assert "failed" not in last
    assert [each["epoch"] for each in heard] == [1, 2]
    result = read_json(str(place / "result.json"))
    assert result["student"]["top1"] == heard[-1]["top1"]
    assert result["teacher"]["name"] == "cifar/resnet8"
    stages = list(result["timeline"])
    assert stages == ["asked", "data", "teacher", "cache", "built", "first_batch", "first_step"]


def test_a_pack_trains_what_lone_trials_train(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, scheduler="none", pack=3)
    base = trial_config(job, job.search)
    configs = [base, with_lr(base, 0.01), replace(base, loss=replace(base.loss, bound="jsd", negatives="rolled"))]
    ended, told = run_pack(tmp_path, job, configs)
    assert ended == {0: ["", ""], 1: ["", ""], 2: ["", ""]}
    evaluations = [json.loads(each["members"])["figures"] for each in told]
    assert [sorted(figures) for figures in evaluations] == [["0", "1", "2"]] * 2 + [[]]
    assert told[0]["top1"] == max(figures["top1"] for figures in evaluations[0].values())
    for number, config in enumerate(configs):
        data = open_data(config.data)
        teacher, facts = obtain_teacher(config, data, cpu(), str(tmp_path / "alone"))
        train(config, data, teacher, cpu(), str(tmp_path / f"alone{number}"), facts, quiet=True)
        alone = (tmp_path / f"alone{number}" / "student.safetensors").read_bytes()
        assert (tmp_path / "pack" / str(number) / "student.safetensors").read_bytes() == alone


def test_a_pack_halves(tmp_path: Path) -> None:
    """Three trials, one in two goes on past the first epoch: the one whose learning rate is no disaster."""
    job = tiny_job(tmp_path, scheduler="asha", reduction=3, grace=1, pack=3)
    base = trial_config(job, job.search)
    ended, _ = run_pack(tmp_path, job, [with_lr(base, 1e-9), base, with_lr(base, 1e-8)])
    tops = {n: read_json(str(tmp_path / "pack" / str(n) / "best.json"))["top1"] for n in range(3)}
    best = max(tops, key=lambda number: tops[number])
    assert [ended[n][0] for n in range(3)] == ["" if n == best else "early" for n in range(3)]
    assert all("epoch 1" in ended[n][1] for n in range(3) if n != best)


def test_failures_are_told_apart_and_cost_the_others_nothing(tmp_path: Path) -> None:
    """Out of memory by a real allocation, a loss that explodes, a layer that is not there: the worst results."""
    job = tiny_job(tmp_path, pack=2)
    base = trial_config(job, job.search)
    huge = replace(base, student=replace(base.student, name="tiny_search:giant"))
    told = run(tmp_path / "a", job, huge)
    assert (told["failed"], told["top1"], told["cross_entropy"], told["epoch"]) == ("out of memory", 0.0, math.inf, 0)
    assert "allocate" in told["reason"]
    told = run(tmp_path / "b", job, wild(base))
    assert told["failed"] == "non-finite"
    assert "lower --optim.lr" in told["reason"]
    told = run(tmp_path / "c", job, replace(base, loss=replace(base.loss, feature_pairs=("stage3:nowhere",))))
    assert told["failed"] == "error"
    assert "nowhere" in told["reason"]
    assert "Traceback" in told["traceback"]
    ended, _ = run_pack(tmp_path / "d", job, [wild(base), base])
    assert [end[0] for _, end in sorted(ended.items())] == ["non-finite", ""]
    ended, _ = run_pack(tmp_path / "e", job, [huge, base])
    assert [end[0] for _, end in sorted(ended.items())] == ["out of memory", ""]


def test_what_a_report_raises_goes_through(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def tell(_: Any) -> None:
        raise Stop

    job = tiny_job(tmp_path)
    with pytest.raises(Stop):
        run(tmp_path, job, trial_config(job, job.search), tell)


def test_a_trial_goes_on_after_it_was_ended_in_a_report(tmp_path: Path) -> None:
    """Ended in its first report, by something that no handler takes for a failure: the rest equals a whole one's."""
    job = tiny_job(tmp_path)
    config = trial_config(job, job.search)

    def leave(_: Any) -> None:
        raise SystemExit(0)  # what Ray Tune does to a trial's thread

    with pytest.raises(SystemExit):
        run(tmp_path / "a", job, config, leave)
    heard: list[Any] = []
    assert "failed" not in run(tmp_path / "a", job, config, lambda figures: heard.append(dict(figures)))
    assert [figures["epoch"] for figures in heard] == [2]
    run(tmp_path / "b", job, config)
    weights = [tmp_path / name / "trial" / "student.safetensors" for name in ("a", "b")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_trial_goes_on_from_another_ones_checkpoint(tmp_path: Path) -> None:
    """Population-based training: the folder of a better trial, and other numbers. Its weights go on, also of a trial
    that has finished, and nothing refuses the values."""
    job = tiny_job(tmp_path)
    config = trial_config(job, job.search)
    run(tmp_path, job, config)
    before = checkpoint.newest(str(tmp_path / "trial"))
    assert before is not None
    heard: list[Any] = []
    run(tmp_path, job, with_lr(config, 0.5), lambda figures: heard.append(dict(figures)))
    assert [figures["epoch"] for figures in heard] == [2], "from the checkpoint of its first epoch"
    after = checkpoint.newest(str(tmp_path / "trial"))
    assert after is not None
    states = [checkpoint.parse(content, CPU) for _, content in (before, after)]
    assert [state["config"]["optim"]["lr"] for state in states] == [config.optim.lr, 0.5]
    assert all(torch.equal(states[0]["distiller"][name], value) for name, value in states[1]["distiller"].items())
    assert read_json(str(tmp_path / "trial" / "config.json"))["optim"]["lr"] == 0.5
    assert run(tmp_path, job, with_lr(config, 0.5)) == {}, "the same values: it has finished"


def test_the_teacher_is_trained_once_and_before(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, {"teacher": {"train": True, "epochs": 1}})
    config = trial_config(job, job.search)
    folder = tmp_path / "s"
    folder.mkdir()
    prepare(config, str(folder), CPU)
    (teacher,) = (tmp_path / "teachers").glob("*/student.safetensors")
    made = teacher.stat().st_mtime_ns
    assert "failed" not in run(folder, job, config)
    assert teacher.stat().st_mtime_ns == made
    facts = read_json(str(folder / "trial" / "result.json"))["teacher"]
    assert facts == read_json(str(folder / "teacher.json"))
    finalist = replace(config, train=replace(config.train, seed=1), optim=replace(config.optim, weight_decay=0.0))
    own = taught(finalist, str(folder))  # in any process, wherever its directory is
    assert (own.teacher.trains, own.teacher.weights) == (False, str(teacher))
    assert own.train == finalist.train
    assert taught(finalist, str(tmp_path / "elsewhere")) == finalist
    for fields in ({"name": "cifar/resnet20"}, {"lr": 0.5}, {"epochs": 2}):  # as a space of fields may ask
        other = replace(config, teacher=replace(config.teacher, **fields))
        assert taught(other, str(folder)) == other


def test_evaluations_of_a_teacher_are_not_told_as_a_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def obtain(config: Config, data: Any, context: Context, folder: str) -> Any:
        context.report({"epoch": 99, "top1": 95.0})  # as training it does
        return obtain_teacher(config, data, context, folder)

    monkeypatch.setattr(run_trials, "obtain_teacher", obtain)
    job = tiny_job(tmp_path)
    told: list[int] = []
    run(tmp_path / "s", job, trial_config(job, job.search), lambda figures: told.append(figures["epoch"]))
    assert told == [1, 2]


def test_a_pack_halves_by_what_json_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite cross-entropy is told as null, and is the worst there is."""
    job = tiny_job(tmp_path, scheduler="asha", reduction=2, grace=1, metric="cross_entropy", pack=2)
    base = trial_config(job, job.search)
    stopped: list[set[int]] = []

    def train_pack(members: Any, data: Any, teacher: Any, context: Any, judge: Any, extra: Any) -> list[Outcome]:
        figures = {"top1": 1.0, "top5": 1.0, "cross_entropy": 2.0}
        stopped.append(set(judge(1, {0: figures | {"cross_entropy": None}, 1: figures})))
        return [Stopped(1), Finished({})]

    monkeypatch.setattr("mimkd_ray.search.run_trials.train_pack", train_pack)
    ended, told = run_pack(tmp_path, job, [base, with_lr(base, 0.01)])
    assert stopped == [{0}]
    assert [end[0] for _, end in sorted(ended.items())] == ["early", ""]
    assert [each["cross_entropy"] for each in told] == [2.0, 2.0]


def test_a_pack_that_is_evaluated_at_no_rung_halves_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rungs are after epochs 1 and 3, evaluations after 2, 4, 6 and 8."""
    job = tiny_job(tmp_path, {"train": {"epochs": 8, "eval_every": 2}}, scheduler="asha", reduction=3, pack=4)
    base = trial_config(job, job.search)
    stopped: list[set[int]] = []

    def train_pack(members: Any, data: Any, teacher: Any, context: Any, judge: Any, extra: Any) -> list[Outcome]:
        for epoch in (2, 4, 6, 8):
            going = {at for at in range(4) if not any(at in each for each in stopped)}
            stopped.append(set(judge(epoch, {at: {"top1": at, "top5": 1.0, "cross_entropy": 2.0} for at in going})))
        return [Stopped(2), Stopped(2), Stopped(4), Finished({})]

    monkeypatch.setattr("mimkd_ray.search.run_trials.train_pack", train_pack)
    run_pack(tmp_path, job, [with_lr(base, 0.01 * (1 + at)) for at in range(4)])
    assert stopped == [{0, 1}, {2}, set(), set()]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("unable to mmap 512 bytes: Cannot allocate memory (12)"),
    ],
)
def test_ways_to_run_out_of_memory(error: Exception) -> None:
    assert explain(error)[0] == "out of memory"


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (
            "train",
            {"lane_batch": 5},
            r"values \(train.lane_batch: 10 -> 5\): population-based training can change numbers",
        ),
        ("optim", {"name": "adamw"}, r"values \(optim.name: sgd -> adamw\)"),
        ("loss", {"feature_weight": 0.0}, "does not fit this configuration: .*terms, layers .* must be the same"),
    ],
)
def test_what_a_population_cannot_change_is_refused(
    tmp_path: Path, section: str, change: dict[str, Any], message: str
) -> None:
    """Half the batch makes twice the steps of an epoch: the trial would take itself for half as old as it is."""
    job = tiny_job(tmp_path)
    config = trial_config(job, job.search)

    class Ended(Exception):
        """By the scheduler."""

    def tell(_: Any) -> None:
        raise Ended

    with pytest.raises(Ended):
        train_trial(config, str(tmp_path), str(tmp_path / "trial"), CPU, tell)
    other = replace(config, **{section: replace(getattr(config, section), **change)})
    with pytest.raises(UserError, match=message):
        train_trial(other, str(tmp_path), str(tmp_path / "trial"), CPU, tell)
