"""What a run does around an evaluation: the best student is kept, a context that may end it hears of committed state,
and mutual information is read on as many rows as it is told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_cache import build_here, cached_config
from tiny_run import cpu, tiny_config, tiny_data, wait_for_checkpoints

from mimkd_ray.cli.local_launch import LocalContext
from mimkd_ray.config import Config
from mimkd_ray.config.digest import digest
from mimkd_ray.errors import UserError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.train.engine.evaluation import evaluate_together
from mimkd_ray.train.engine.student import lone_student
from mimkd_ray.train.loop import Loop, train
from mimkd_ray.train.networks.build import build_network
from mimkd_ray.train.networks.teacher import Teacher
from mimkd_ray.train.records import checkpoint
from mimkd_ray.train.run_record import Run

LABELS = {"global_weight": 0.0, "local_weight": 0.0, "feature_weight": 0.0}


def labels_only(**sections: dict[str, Any]) -> Config:
    """Four epochs of three steps without a teacher."""
    train = {"epochs": 4} | sections.pop("train", {})
    return tiny_config(loss=LABELS, train=train, **sections)


def run(config: Config, folder: Path, context: LocalContext | None = None, quiet: bool = False) -> dict[str, Any]:
    return train(config, tiny_data(config), None, context or cpu(), str(folder), quiet=quiet)


def metrics(folder: Path, kind: str = "eval") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


class _KillError(Exception):
    pass


class FinalContext(LocalContext):
    """One whose reports may end the process."""

    reports_are_final = True

    def __init__(self, folder: Path, die_at: int = -1) -> None:
        super().__init__(torch.device("cpu"))
        self.folder, self.die_at = folder, die_at
        self.heard: list[tuple[int, int, bool]] = []

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Note what is committed."""
        found = checkpoint.newest_shared([str(self.folder)])[0]
        self.heard.append((metrics["step"], found, (self.folder / "result.json").exists()))
        if metrics["step"] == self.die_at:
            raise _KillError


# (a) reports


def test_a_report_that_may_be_the_last_comes_after_all_is_committed(tmp_path: Path) -> None:
    """No checkpoint is due by the config. At the end it is the result that is there."""
    context = FinalContext(tmp_path)
    run(labels_only(run={"checkpoint_every": 0}), tmp_path, context, quiet=True)
    assert context.heard == [(3, 3, False), (6, 6, False), (9, 9, False), (12, 9, True)]


def test_a_run_that_was_ended_in_a_report_goes_on_from_it(tmp_path: Path) -> None:
    config = labels_only(run={"checkpoint_every": 0, "keep_best": True})
    with pytest.raises(_KillError):
        run(config, tmp_path / "cut", FinalContext(tmp_path / "cut", die_at=6))
    result = run(config, tmp_path / "cut", FinalContext(tmp_path / "cut"))
    assert result["resumed_from"] == 6
    run(config, tmp_path / "whole")
    for name in ("student", "best"):
        ours, theirs = (load_file(tmp_path / where / f"{name}.safetensors") for where in ("cut", "whole"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (tmp_path / "cut/best.json").read_bytes() == (tmp_path / "whole/best.json").read_bytes()


def test_a_report_of_a_plain_context_comes_after_the_checkpoint_is_begun_and_not_at_all_if_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, int]] = []
    save = Run.save
    monkeypatch.setattr(Run, "save", lambda self, done: order.append(("save", done)) or save(self, done))
    monkeypatch.setattr(LocalContext, "report", lambda _, metrics: order.append(("report", metrics["step"])))
    run(labels_only(run={"checkpoint_every": 2}), tmp_path / "a")
    assert order == [("report", 3), ("save", 6), ("report", 6), ("report", 9), ("report", 12)]
    order.clear()
    run(labels_only(run={"checkpoint_every": 2}), tmp_path / "b", quiet=True)
    assert order == [("save", 6)]


def test_what_is_written_of_a_step_is_shown_live_and_so_is_what_a_checkpoint_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, float]] = []
    monkeypatch.setattr(LocalContext, "observe", lambda _, run_dir, values: seen.append({"at": run_dir, **values}))
    result = run(labels_only(train={"log_every": 2}, run={"checkpoint_every": 2}), tmp_path)
    written = [{key: value for key, value in line.items() if key != "kind"} for line in metrics(tmp_path, "train")]
    assert [line["step"] for line in written] == [2, 4, 6, 8, 10, 12]
    assert [{**line, "at": str(tmp_path)} for line in written] == [line for line in seen if "step" in line]
    assert {"loss", "images_per_second", "data_wait", "lr"} <= set(seen[0])
    (stall,) = (line["checkpoint_stall"] for line in seen if "step" not in line)
    assert stall == result["checkpoints"]["stall_seconds"]


# (b) the best student


def scripted(monkeypatch: pytest.MonkeyPatch, *tops: float) -> None:
    """Evaluations that find these top-1, one after the other."""
    real, left = Loop.evaluate, list(tops)
    monkeypatch.setattr(Loop, "evaluate", lambda self, done: [real(self, done)[0] | {"top1": left.pop(0)}])


def best(folder: Path) -> tuple[int, int, float]:
    found = json.loads((folder / "best.json").read_text())
    return found["step"], found["epoch"], found["top1"]


def test_a_damaged_note_of_the_best_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worse student does not take the best one's place."""
    config = labels_only(run={"checkpoint_every": 0, "keep_best": True})
    scripted(monkeypatch, 10.0, 30.0, 20.0, 25.0)
    with pytest.raises(_KillError):
        run(config, tmp_path, FinalContext(tmp_path, die_at=6))
    whole, weights = (tmp_path / "best.json").read_bytes(), (tmp_path / "best.safetensors").read_bytes()
    assert best(tmp_path) == (6, 2, 30.0)
    (tmp_path / "best.json").write_bytes(whole[: len(whole) // 2])
    run(config, tmp_path, FinalContext(tmp_path))
    assert "it is made anew from metrics.jsonl" in caplog.text
    assert (tmp_path / "best.json").read_bytes() == whole
    assert (tmp_path / "best.safetensors").read_bytes() == weights


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_best_student_is_that_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: float) -> None:
    """Of equal ones the earlier. The student is the one that a run which ends there exports."""
    sections = {"train": {"ema_decay": ema, "lanes": 2}}
    with monkeypatch.context() as patch:
        scripted(patch, 10.0, 30.0, 30.0, 20.0)
        run(labels_only(run={"keep_best": True}, **sections), tmp_path / "whole")
    assert best(tmp_path / "whole") == (6, 2, 30.0)
    told = metrics(tmp_path / "whole")[1]
    del told["kind"]
    assert json.loads((tmp_path / "whole/best.json").read_text()) == told
    run(labels_only(train=sections["train"] | {"max_steps": 6}), tmp_path / "short")
    ours, theirs = load_file(tmp_path / "whole/best.safetensors"), load_file(tmp_path / "short/student.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize(("checkpoint_every", "start", "found"), [(2, 6, (6, 2, 30.0)), (0, 0, (9, 3, 25.0))])
def test_a_resumed_run_goes_on_from_the_best_that_is_not_of_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint_every: int, start: int, found: tuple[int, int, float]
) -> None:
    config = labels_only(run={"keep_best": True, "checkpoint_every": checkpoint_every})
    with monkeypatch.context() as patch:
        scripted(patch, 10.0, 30.0)  # and the third one raises IndexError
        with pytest.raises(IndexError):
            run(config, tmp_path)
    wait_for_checkpoints()
    assert best(tmp_path) == (6, 2, 30.0)
    with monkeypatch.context() as patch:
        scripted(patch, *([25.0, 20.0] if start else [15.0, 20.0, 25.0, 10.0]))
        assert run(config, tmp_path)["resumed_from"] == start
    assert best(tmp_path) == found


def test_the_best_is_not_kept_unasked(tmp_path: Path) -> None:
    run(labels_only(train={"epochs": 1}), tmp_path)
    assert not list(tmp_path.glob("best*"))


# (c) rows on which information is read


@pytest.mark.parametrize(("rows", "batches"), [(0, 0), (1, 1), (30, 3), (31, 4), (2048, 45)])
def test_information_is_read_on_so_many_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, batches: int
) -> None:
    config = tiny_config(train={"information_rows": rows})
    student = lone_student(config, tiny_data(config), build_model("cifar/resnet8", 10), cpu())
    calls = []
    real = Teacher.features
    monkeypatch.setattr(Teacher, "features", lambda self, images: calls.append(len(images)) or real(self, images))
    values = evaluate_together([student])[student]
    assert calls == [10] * batches
    assert ("global/pool-pool/nats" in values) is (rows > 0)
    assert values["rows"] == 450


def test_a_cached_run_without_information_and_canary_never_asks_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cached_config(tmp_path / "cache", train={"information_rows": 0}, cache={"canary": 0.0})
    build_here(config)
    monkeypatch.setattr(Teacher, "features", lambda *_: pytest.fail("the teacher ran"))
    data = tiny_data(config)
    result = train(config, data, build_network(config, 10, "random"), cpu(), str(tmp_path / "run"))
    assert result["nats"]["feature/stage3-stage3"] == {"nats": None, "ceiling": None}
    assert metrics(tmp_path / "run", "train")[0]["feature/stage3-stage3/nats"] is not None


def test_neither_rows_of_information_nor_the_best_decide_what_is_trained() -> None:
    assert digest(tiny_config()) == digest(tiny_config(train={"information_rows": 7}, run={"keep_best": True}))
    with pytest.raises(UserError, match=r"train\.information_rows is -1"):
        tiny_config(train={"information_rows": -1})
