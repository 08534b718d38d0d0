from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import pytest

from mimkd_ray import local_files, storage
from mimkd_ray.config import RunConfig
from mimkd_ray.errors import UserError
from mimkd_ray.json_files import read_json
from mimkd_ray.train.records.run_dir import MetricsLog, write_json


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    log = MetricsLog(str(tmp_path), 0, RunConfig(tensorboard=False))
    log.write("train", 1, {"nats": math.nan, "ceiling": math.inf, "loss": 0.5})
    log.close()
    assert _lines(tmp_path / "metrics.jsonl") == [
        {"kind": "train", "step": 1, "nats": None, "ceiling": None, "loss": 0.5}
    ]


def test_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    first = MetricsLog(str(tmp_path), 0, RunConfig(tensorboard=False))
    for step in range(1, 6):
        first.write("train", step, {"loss": step})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # a kill in the middle of a line
    second = MetricsLog(str(tmp_path), 3, RunConfig(tensorboard=False))
    second.write("train", 4, {"loss": 40})
    second.close()
    assert [(line["step"], line["loss"]) for line in _lines(tmp_path / "metrics.jsonl")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named_and_costs_no_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = MetricsLog(str(tmp_path), 0, RunConfig(tensorboard=False))
    first.write("train", 1, {"loss": 1.0})
    with open("/dev/full", "wb", buffering=0) as full, monkeypatch.context() as patch:
        patch.setattr(first, "_lines", full)
        with pytest.raises(UserError, match=rf"cannot write to {tmp_path}: no space is left .*make room"):
            first.write("train", 2, {"loss": 2.0})

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:  # a start on the full disk: it must not begin by emptying the file
        patch.setattr(local_files.os, "fsync", refuse)
        with pytest.raises(UserError, match="no space is left"):
            MetricsLog(str(tmp_path), 1, RunConfig(tensorboard=False))
    second = MetricsLog(str(tmp_path), 1, RunConfig(tensorboard=False))
    second.write("train", 2, {"loss": 2.0})
    second.close()
    assert [line["loss"] for line in _lines(tmp_path / "metrics.jsonl")] == [1.0, 2.0]


def test_tensorboard_holds_the_same_points(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(str(tmp_path), 0, RunConfig(tensorboard=True))
    for step, loss in ((1, 2.0), (2, 1.5)):
        log.write("train", step, {"loss": loss, "feature/a-b/nats": 0.25})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.0), (2, 1.5)]
    assert events.Tags()["scalars"] == ["train/loss", "train/feature/a-b/nats"]


def test_a_remote_run_is_staged_and_published_whole() -> None:
    run = "memory://files-test/run"
    log = MetricsLog(run, 0, RunConfig(tensorboard=True))
    log.write("train", 1, {"loss": 1.0})
    log.publish(run)
    log.write("train", 2, {"loss": 0.5})
    log.publish(run)
    log.close()
    lines = storage.read_bytes(storage.join(run, "metrics.jsonl")).decode().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1.0, 0.5]
    assert len(storage.list_files(storage.join(run, "tensorboard"))) == 1
    resumed = MetricsLog(run, 1, RunConfig(tensorboard=False))
    resumed.write("train", 2, {"loss": 0.4})
    resumed.publish(run)
    resumed.close()
    lines = storage.read_bytes(storage.join(run, "metrics.jsonl")).decode().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1.0, 0.4]


def test_json_round_trip_and_absence(tmp_path: Path) -> None:
    url = str(tmp_path / "a" / "result.json")
    assert read_json(url) is None
    write_json(url, {"top1": 1.5, "nats": math.nan})
    assert read_json(url) == {"top1": 1.5, "nats": None}
