"""The watch for a stop request in the first worker of Ray Train, without Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("ray")

from mimkd_ray import storage
from mimkd_ray.launch import ray_train
from mimkd_ray.storage import StorageError
from mimkd_ray.train.files import write_json

LAUNCH = "this-launch"


class _FirstWorker:
    def get_world_rank(self) -> int:
        return 0

    def get_world_size(self) -> int:
        return 1


def watching(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> ray_train.RayContext:
    """The context of the only worker of a job, which looks for a stop request a hundred times a second."""
    monkeypatch.setattr(ray_train, "STOP_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(ray_train.ray.train, "get_context", _FirstWorker)
    monkeypatch.setattr(ray_train.ray.train.torch, "get_device", lambda: torch.device("cpu"))
    return ray_train.RayContext(LAUNCH, str(run_dir), joined=False)


def within(seconds: float, condition: Callable[[], Any]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return bool(condition())


def test_a_stop_request_is_heeded_after_storage_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Five looks of which the first, and the third and fourth in a row fail: one line for each row of failures."""
    answers = ["fails", "works", "fails", "fails", "works"]
    looks: list[str] = []
    exists = storage.exists

    def failing(url: str) -> bool:
        assert url == str(tmp_path / "stop.json")
        looks.append(url)
        if len(looks) <= len(answers) and answers[len(looks) - 1] == "fails":
            raise StorageError(f"{url}: the store answers 503\nslow down (look {len(looks)})")
        return exists(url)

    monkeypatch.setattr(storage, "exists", failing)
    with caplog.at_level(logging.WARNING):
        context = watching(monkeypatch, tmp_path)
        assert within(10, lambda: len(looks) > len(answers)), "the watch has ended with an error"
        assert not context.stop_requested()
        write_json(str(tmp_path / "stop.json"), {"launch_id": LAUNCH})
        assert within(10, context.stop_requested)
    said = [record.getMessage() for record in caplog.records if record.name == ray_train.__name__]
    assert ["look 1" in said[0], "look 3" in said[1], len(said)] == [True, True, 2]
    for line in said:
        assert "\n" not in line
        assert "StorageError" in line
        assert "the store answers 503 slow down" in line


@pytest.mark.parametrize("content", ["{", "[]", '{"launch": "x"}'])
def test_a_file_that_is_no_request_does_not_end_the_watch(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "stop.json"
    file.write_text(content)
    context = watching(monkeypatch, tmp_path)
    assert within(10, lambda: "cannot look for a stop request" in caplog.text)
    assert not context.stop_requested()
    write_json(str(file), {"launch_id": ray_train.ANYBODY})
    assert within(10, context.stop_requested)


def test_a_request_to_another_launch_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(str(tmp_path / "stop.json"), {"launch_id": "an earlier launch"})
    context = watching(monkeypatch, tmp_path)
    assert not within(0.2, context.stop_requested)
    write_json(str(tmp_path / "stop.json"), {"launch_id": LAUNCH})
    assert within(10, context.stop_requested)
