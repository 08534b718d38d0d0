"""Trials in a process: alone and in a pack, with their failures told apart; the driver's word ends them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import cpu
from tiny_search import tiny_job

from mimkd_ray.config import Config, SearchJob
from mimkd_ray.config.json_form import to_dict
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.search.driver import trial_config
from mimkd_ray.search.run_trials import explain, prepare, run_trials
from mimkd_ray.search.trial_folders import Ended, Planned
from mimkd_ray.train.loop import train
from mimkd_ray.train.records.outcomes import Finished, Outcome, Stopped
from mimkd_ray.train.records.run_dir import read_json
from mimkd_ray.train.worker import obtain_teacher

CPU = torch.device("cpu")


def with_lr(config: Config, lr: float) -> Config:
    return replace(config, optim=replace(config.optim, lr=lr))


def run(
    folder: Path, job: SearchJob, configs: list[Config], tell: Any = lambda _: None
) -> tuple[dict[int, Ended], dict[int, str]]:
    planned = [Planned(number, 0, {}, to_dict(config)) for number, config in enumerate(configs)]
    places = {number: str(folder / f"trial{number}") for number in range(len(configs))}
    return run_trials(job.search, planned, str(folder), places, CPU, tell), places


def test_a_lone_trial_reports_what_is_committed(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    config = trial_config(job)
    heard: list[Mapping[str, Any]] = []

    def tell(figures: Mapping[int, Mapping[str, Any]]) -> None:
        heard.append(figures[0])
        folders = list((tmp_path / "trial0" / "checkpoints").glob("*/committed.json"))
        assert folders or figures[0]["epoch"] == 2, "a worker may be ended in a report"
        assert read_json(str(tmp_path / "trial0" / "best.json"))["top1"] == max(each["top1"] for each in heard)

    ended, places = run(tmp_path, job, [config], tell)
    assert ended[0].state == "completed"
    assert [each["epoch"] for each in heard] == [1, 2]
    stages = ended[0].details
    assert list(stages) == ["asked", "data", "teacher", "cache", "built", "first_batch", "first_step"]
    assert [0.0, *sorted(stages.values())[1:]] == list(stages.values())
    assert stages["first_step"] <= ended[0].seconds
    result = read_json(f"{places[0]}/result.json")
    assert result["student"]["top1"] == heard[-1]["top1"]
    assert result["teacher"]["name"] == "cifar/resnet8"


def test_a_pack_trains_what_lone_trials_train(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, scheduler="none")
    base = trial_config(job)
    configs = [base, with_lr(base, 0.01), replace(base, loss=replace(base.loss, bound="jsd", negatives="rolled"))]
    heard: list[Any] = []
    ended, places = run(tmp_path / "pack", job, configs, heard.append)
    assert [each.state for each in ended.values()] == ["completed"] * 3
    assert [sorted(figures) for figures in heard] == [[0, 1, 2]] * 2
    for number, config in enumerate(configs):
        data = open_data(config.data)
        teacher, facts = obtain_teacher(config, data, cpu(), str(tmp_path / "alone"))
        train(config, data, teacher, cpu(), str(tmp_path / f"alone{number}"), facts, quiet=True)
        alone = (tmp_path / f"alone{number}" / "student.safetensors").read_bytes()
        assert (Path(places[number]) / "student.safetensors").read_bytes() == alone


def test_a_pack_halves(tmp_path: Path) -> None:
    """Three trials, one in two goes on past the first epoch: the one whose learning rate is no disaster."""
    job = tiny_job(tmp_path, scheduler="asha", reduction=3, grace=1)
    base = trial_config(job)
    ended, places = run(tmp_path, job, [with_lr(base, 1e-9), base, with_lr(base, 1e-8)])
    tops = {n: read_json(f"{place}/best.json")["top1"] for n, place in places.items()}
    best = max(tops, key=lambda number: tops[number])
    assert [ended[n].state for n in range(3)] == ["completed" if n == best else "stopped" for n in range(3)]
    stopped = next(each for each in ended.values() if each.state == "stopped")
    assert (stopped.kind, "epoch 1" in stopped.reason) == ("early", True)


def test_failures_are_told_apart_and_cost_the_others_nothing(tmp_path: Path) -> None:
    """Out of memory by a real allocation, a loss that explodes, a layer that is not there."""
    job = tiny_job(tmp_path)
    base = trial_config(job)
    huge = replace(base, loss=replace(base.loss, critic=replace(base.loss.critic, width=200_000)))
    ended, _ = run(tmp_path / "a", job, [huge])
    assert (ended[0].state, ended[0].kind) == ("failed", "out of memory"), ended
    assert "allocate" in ended[0].reason
    ended, _ = run(tmp_path / "b", job, [with_lr(base, 1e30)])
    assert (ended[0].state, ended[0].kind) == ("failed", "non-finite")
    assert "lower --optim.lr" in ended[0].reason
    wrong = replace(base, loss=replace(base.loss, feature_pairs=("stage3:nowhere",)))
    ended, _ = run(tmp_path / "c", job, [wrong])
    assert (ended[0].state, ended[0].kind) == ("failed", "error")
    assert "nowhere" in ended[0].reason
    assert "Traceback" in (tmp_path / "c" / "trial0" / "error.txt").read_text()
    ended, _ = run(tmp_path / "d", job, [with_lr(base, 1e30), base])
    assert [(each.state, each.kind) for each in ended.values()] == [("failed", "non-finite"), ("completed", "")]
    ended, _ = run(tmp_path / "e", job, [huge, base])
    assert [(each.state, each.kind) for each in ended.values()] == [("failed", "out of memory"), ("completed", "")]


def test_what_the_driver_raises_goes_through(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def tell(_: Any) -> None:
        raise Stop

    job = tiny_job(tmp_path)
    with pytest.raises(Stop):
        run(tmp_path, job, [trial_config(job)], tell)


def test_a_trial_goes_on_after_it_was_ended_in_a_report(tmp_path: Path) -> None:
    """Ended in its first report, by something that no handler takes for a failure: the rest equals a whole one's."""
    job = tiny_job(tmp_path)
    config = trial_config(job)

    def leave(_: Any) -> None:
        raise SystemExit(0)  # what Ray Tune does to a trial's thread

    with pytest.raises(SystemExit):
        run(tmp_path / "a", job, [config], leave)
    heard: list[Any] = []
    ended, places = run(tmp_path / "a", job, [config], heard.append)
    assert ended[0].state == "completed"
    assert [figures[0]["epoch"] for figures in heard] == [2]
    _, whole = run(tmp_path / "b", job, [config])
    weights = [Path(place[0]) / "student.safetensors" for place in (places, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_teacher_is_trained_once_and_before(tmp_path: Path) -> None:
    sections = {"teacher": {"train": True, "epochs": 1}}
    job = tiny_job(tmp_path, sections)
    config = trial_config(job)
    prepare(config, str(tmp_path), CPU)
    made = (tmp_path / "teacher" / "student.safetensors").stat().st_mtime_ns
    ended, places = run(tmp_path, job, [config])
    assert ended[0].state == "completed"
    assert (tmp_path / "teacher" / "student.safetensors").stat().st_mtime_ns == made
    facts = read_json(f"{places[0]}/result.json")["teacher"]
    assert facts == read_json(str(tmp_path / "teacher.json"))


def test_a_pack_halves_by_what_json_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite cross-entropy is told as null, and is the worst there is."""
    job = tiny_job(tmp_path, scheduler="asha", reduction=2, grace=1, metric="cross_entropy")
    base = trial_config(job)
    stopped: list[set[int]] = []

    def train_pack(members: Any, data: Any, teacher: Any, context: Any, judge: Any, extra: Any) -> list[Outcome]:
        figures = {"top1": 1.0, "top5": 1.0, "cross_entropy": 2.0}
        stopped.append(set(judge(1, {0: figures | {"cross_entropy": None}, 1: figures})))
        return [Stopped(1), Finished({})]

    monkeypatch.setattr("mimkd_ray.search.run_trials.train_pack", train_pack)
    ended, _ = run(tmp_path, job, [base, with_lr(base, 0.01)])
    assert stopped == [{0}]
    assert [each.state for each in ended.values()] == ["stopped", "completed"]


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
