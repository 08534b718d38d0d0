"""A finished run begun anew, or only looked at, by two processes as torchrun starts them: the first one decides."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import start_ranks
from tiny_run import tiny_config

from mimkd_ray import storage
from mimkd_ray.cli import local_launch, training
from mimkd_ray.config import Config, RunConfig
from mimkd_ray.errors import UserError
from mimkd_ray.train.records import run_files


def _rank(rank: int, world: int, port: int, config: Config, folder: str) -> None:
    """One process of torchrun, with its environment. Leaves the result or the words of a UserError in the folder."""
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    local_launch.GROUP_SECONDS = 60  # a process that waits for one which is gone fails sooner
    overwrite = run_files.overwrite

    def removed_late(url: str) -> None:
        time.sleep(1)  # in which the other process would read what is there still
        overwrite(url)

    run_files.overwrite = removed_late
    try:
        found: Any = training.run(config)
    except UserError as error:
        found = str(error)
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))


def _both(config: Config, folder: Path) -> list[Any]:
    """Run the job in two processes; return the result or error of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir()
    start_ranks(_rank, (2, port, config, str(folder)), 2)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_overwrite_look_at_and_refuse_a_finished_run(tmp_path: Path) -> None:
    config = tiny_config(
        run={"root": str(tmp_path / "runs"), "name": "one"}, train={"max_steps": 2}, launch={"gpu": "off"}
    )
    result = tmp_path / "runs" / "one" / "result.json"
    first = _both(config, tmp_path / "first")
    assert first[0] == first[1] == json.loads(result.read_text())
    assert (first[0]["workers"], first[0]["steps"]) == (2, 2)

    anew = _both(replace(config, run=replace(config.run, overwrite=True)), tmp_path / "anew")
    assert anew[0] == anew[1] == json.loads(result.read_text())
    assert anew[0]["timeline"]["first_step"] > first[0]["timeline"]["first_step"], "it was trained again"
    assert anew[0]["student"] == first[0]["student"]

    written = result.stat().st_mtime_ns
    assert _both(config, tmp_path / "looked") == anew
    assert result.stat().st_mtime_ns == written

    refused = _both(replace(config, optim=replace(config.optim, lr=0.1)), tmp_path / "refused")
    assert refused[0] == refused[1]
    assert "optim.lr: 0.05 -> 0.1" in refused[0]


def test_torchrun_and_ray_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = replace(tiny_config(launch={"backend": "ray"}), run=RunConfig(root=str(tmp_path)))
    with pytest.raises(UserError, match=r"launch\.backend is ray.*--launch\.backend local"):
        training.run(config)


def test_more_processes_than_lanes_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = local_launch.LocalContext(torch.device("cpu"), rank=0, world_size=3)
    monkeypatch.setattr(training, "local_context", lambda *_: nullcontext(three))
    with pytest.raises(UserError, match=r"launch\.workers is 3 and train\.lanes 2: .*--train\.lanes 3"):
        training.run(tiny_config(run={"root": str(tmp_path), "name": "one"}))
    assert not (tmp_path / "one").exists()


def test_a_config_that_cannot_be_run_leaves_no_directory(tmp_path: Path) -> None:
    """Nor is the one that mends it refused because something else was trained there."""
    config = tiny_config(
        run={"root": str(tmp_path), "name": "one"}, train={"max_steps": 1}, launch={"gpu": "off"}, loss={"name": ()}
    )
    with pytest.raises(UserError, match="nowhere"):
        training.run(replace(config, data=replace(config.data, root=str(tmp_path / "nowhere"))))
    assert not (tmp_path / "one").exists()
    assert training.run(config)["steps"] == 1


def test_a_config_that_cannot_be_run_overwrites_nothing(tmp_path: Path) -> None:
    config = tiny_config(
        run={"root": str(tmp_path), "name": "one"}, train={"max_steps": 1}, launch={"gpu": "off"}, loss={"name": ()}
    )
    first = training.run(config)
    anew = replace(config, run=replace(config.run, overwrite=True))
    with pytest.raises(UserError, match="there is no weights file"):
        training.run(replace(anew, student=replace(config.student, weights=str(tmp_path / "gone.safetensors"))))
    assert training.run(config) == first, "it is there as it was"


def test_a_run_writes_its_config_once_and_is_asked_once_for_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(
        run={"root": str(tmp_path), "name": "one"}, train={"max_steps": 1}, launch={"gpu": "off"}, loss={"name": ()}
    )
    written: list[str] = []
    asked: list[str] = []
    read_bytes, write_bytes = storage.read_bytes, storage.write_bytes

    def noted_read(url: str, small: bool = False) -> bytes:
        if not any(each.endswith("result.json") for each in written):  # the report reads it afterwards
            asked.append(url)
        return read_bytes(url, small)

    def noted_write(url: str, data: bytes) -> None:
        written.append(url)
        write_bytes(url, data)

    monkeypatch.setattr(storage, "read_bytes", noted_read)
    monkeypatch.setattr(storage, "write_bytes", noted_write)
    training.run(config)
    assert [url for url in written if url.endswith("config.json")] == [str(tmp_path / "one" / "config.json")]
    assert [url for url in asked if url.endswith("result.json")] == [str(tmp_path / "one" / "result.json")]
