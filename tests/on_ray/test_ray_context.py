"""Stop requests and preemptions in a worker of Ray Train, without a cluster."""

from __future__ import annotations

import _thread
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("ray")

from mimkd_ray import console, storage
from mimkd_ray.errors import UserError
from mimkd_ray.on_ray import train_workers, worker_context
from mimkd_ray.storage import StorageError
from mimkd_ray.train.distributed import Preemption
from mimkd_ray.train.records.run_dir import write_json

LAUNCH = "this-launch"


def watching(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path, joined: bool = False, rank: int = 0
) -> worker_context.RayContext:
    """The context of a worker of a job, which looks for a stop request a hundred times a second."""
    place = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: rank + 1)
    monkeypatch.setattr(worker_context, "STOP_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(worker_context, "OTHERS_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(worker_context, "ASKED_TO_STOP", threading.Event())  # not that of this whole process
    monkeypatch.setattr(worker_context.ray.train, "get_context", lambda: place)
    monkeypatch.setattr(worker_context.ray.train.torch, "get_device", lambda: torch.device("cpu"))
    return worker_context.RayContext(LAUNCH, str(run_dir), joined)


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
    read_bytes = storage.read_bytes

    def failing(url: str, small: bool = False) -> bytes:
        assert url == str(tmp_path / "stop.json")
        looks.append(url)
        if len(looks) <= len(answers) and answers[len(looks) - 1] == "fails":
            raise StorageError(f"{url}: the store answers 503\nslow down (look {len(looks)})")
        return read_bytes(url, small)

    monkeypatch.setattr(storage, "read_bytes", failing)
    with caplog.at_level(logging.WARNING):
        context = watching(monkeypatch, tmp_path)
        assert within(10, lambda: len(looks) > len(answers)), "the watch has ended with an error"
        assert not context.stop_requested()
        write_json(str(tmp_path / "stop.json"), {"launch_id": LAUNCH})
        assert within(10, context.stop_requested)
    said = [record.getMessage() for record in caplog.records if record.name == worker_context.__name__]
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
    write_json(str(file), {"launch_id": worker_context.ANYBODY})
    assert within(10, context.stop_requested)


def test_a_request_to_another_launch_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(str(tmp_path / "stop.json"), {"launch_id": "an earlier launch"})
    context = watching(monkeypatch, tmp_path)
    assert not within(0.2, context.stop_requested)
    write_json(str(tmp_path / "stop.json"), {"launch_id": LAUNCH})
    assert within(10, context.stop_requested)


def test_a_preemption_that_ray_hears_of_is_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cluster of others'; in a Ray of our own nobody drains nodes, and Ray is not asked."""
    from ray.train import PreemptionInfo

    monkeypatch.setattr(worker_context, "LiveMetrics", object)
    info: list[Any] = [None]
    monkeypatch.setattr(worker_context.ray.train, "get_preemption_info", lambda: info[0])
    joined, own = watching(monkeypatch, tmp_path, joined=True), watching(monkeypatch, tmp_path)
    assert joined.preemption() is None
    info[0] = PreemptionInfo(deadline_ms=1_700_000_000_500, preempted_node_to_ranks={"b": [2, 0], "a": [1]})
    assert joined.preemption() == Preemption(nodes=("a", "b"), ranks=(0, 1, 2), deadline=1_700_000_000.5)
    assert own.preemption() is None
    info[0] = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0]})
    assert joined.preemption() == Preemption(nodes=("a",), ranks=(0,), deadline=None)
    write_json(str(tmp_path / "stop.json"), {"launch_id": worker_context.ANYBODY})  # ends both threads
    assert within(10, lambda: joined.stop_requested() and own.stop_requested())


def test_a_worker_that_is_stuck_leaves_an_error_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(worker_context, "STOP_SECONDS", 0.05)
    monkeypatch.setattr(worker_context.os, "_exit", ended.append)
    write_json(str(tmp_path / "stop.json"), {"launch_id": LAUNCH})
    watching(monkeypatch, tmp_path)
    assert within(10, lambda: ended == [3])
    error = json.loads((tmp_path / "error.json").read_text())
    assert (error["launch_id"], error["kind"]) == (LAUNCH, "Interrupted")
    assert "asked to stop, and no step has ended in 0 s: ended without saving" in error["message"]


def test_every_worker_hears_and_only_the_first_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second worker's loader processes may be what the first waits for."""
    ended: list[int] = []
    monkeypatch.setattr(worker_context, "STOP_SECONDS", 0.05)
    monkeypatch.setattr(worker_context.os, "_exit", ended.append)
    second = watching(monkeypatch, tmp_path, rank=1)
    assert not second.stop_requested()
    assert not worker_context.ASKED_TO_STOP.is_set()
    write_json(str(tmp_path / "stop.json"), {"launch_id": LAUNCH})
    assert worker_context.ASKED_TO_STOP.wait(10), "its loader processes are waited for without limit"
    time.sleep(0.3)
    assert ended == []


@pytest.mark.parametrize("way", ["asks", "is over"])
def test_a_worker_that_heard_the_request_takes_its_time(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(worker_context, "STOP_SECONDS", 0.3)
    monkeypatch.setattr(worker_context.os, "_exit", ended.append)
    context = watching(monkeypatch, tmp_path)
    write_json(str(tmp_path / "stop.json"), {"launch_id": LAUNCH})
    if way == "asks":
        assert within(10, context.stop_requested)
    else:
        context.over()
    time.sleep(0.6)
    assert ended == []


def test_ctrl_c_asks_the_workers_once_and_ends_at_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = tmp_path / "stop.json"
    going: list[console.Status | None] = []

    class Heard(console.Shown):
        def status(self, status: console.Status | None) -> None:
            going.append(status)

    usual = console.use(Heard())
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with train_workers.forwarded_stop(str(tmp_path), LAUNCH):
        os.kill(os.getpid(), signal.SIGINT)
        assert within(10, stop.exists)
        assert json.loads(stop.read_text()) == {"launch_id": LAUNCH}
        assert going[-1] == console.Status("waiting for the workers to save and end", unit="images")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    console.use(usual)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    said = capsys.readouterr().out
    assert said.count("stopping: the workers are asked to save and end; a second Ctrl-C ends at once") == 1
    lost = train_workers.forwarded_stop(str(tmp_path), LAUNCH, lambda: "nodes were lost")
    with lost, pytest.raises(KeyboardInterrupt):
        interrupted()


def test_a_request_to_stop_that_was_not_written_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    monkeypatch.setattr(train_workers.console, "line", said.append)
    with train_workers.forwarded_stop(str(tmp_path), LAUNCH):
        with monkeypatch.context() as patch:
            patch.setattr(train_workers, "write_json", lambda *_: [][0])
            os.kill(os.getpid(), signal.SIGTERM)
            assert within(10, lambda: len(said) == 2)
        assert "another SIGTERM asks them again" in said[1]
        os.kill(os.getpid(), signal.SIGTERM)
        assert within(10, (tmp_path / "stop.json").exists)


def interrupted() -> None:
    """As LossWatch does it."""
    _thread.interrupt_main()
    time.sleep(1)


def test_work_beside_signals_is_interrupted_and_its_errors_are_raised(request: pytest.FixtureRequest) -> None:
    """Not by a handler that is set within the work, as Ray Train does in the main thread."""
    # What a shell runs in the background ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def fail() -> None:
        assert threading.current_thread() is not threading.main_thread()
        raise UserError("what went wrong")

    with pytest.raises(UserError, match="what went wrong"):
        train_workers.beside_signals(fail)
    train_workers.beside_signals(lambda: None)
    stuck = threading.Event()
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        train_workers.beside_signals(stuck.wait)
    stuck.set()
