"""Pushing to a stand-in of the hub, in a process that knows it by HF_ENDPOINT; and by the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stand_in import TOKEN, Hub
from hub_stand_in import stand_in as stand_in

from mimkd_ray.__main__ import main
from mimkd_ray.export import examine, export_student
from mimkd_ray.models.build_model import build_model

pytest.importorskip("huggingface_hub")

PUSH = """
import sys
from pathlib import Path
from mimkd_ray.errors import UserError
from mimkd_ray.export.hub import check_client, push
try:
    check_client("org/net")
    print(push(Path(sys.argv[1]), "org/net"))
except UserError as error:
    print(error)
"""


def _push(folder: Path, hub: Hub, token: str = TOKEN) -> str:
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder.parent / "home")}
    environment |= {"HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PUSH, str(folder)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _folder(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    for name, content in {"README.md": b"card", "config.json": b"{}", "model.safetensors": bytes(range(256))}.items():
        (folder / name).write_bytes(content)
    return folder


def test_all_files_are_pushed_into_a_new_repository(tmp_path: Path, stand_in: Hub) -> None:
    folder = _folder(tmp_path)
    assert _push(folder, stand_in) == f"{stand_in.endpoint}/org/net"
    assert stand_in.repositories == ["org/net"]
    assert stand_in.files == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_hub_that_refuses_gives_one_line(tmp_path: Path, stand_in: Hub) -> None:
    folder = _folder(tmp_path)
    stand_in.refuses = True
    said = _push(folder, stand_in)
    assert said.startswith(f"--push-to org/net: the hub at {stand_in.endpoint} refuses: 403: ")
    assert "You don't have the rights to create a model" in said
    assert "the files stay here" in said
    assert "\n" not in said
    assert TOKEN not in said


def test_a_hub_that_is_not_there(tmp_path: Path, stand_in: Hub) -> None:
    """Nobody refuses, so that no other name or token helps."""
    stand_in.endpoint = "http://127.0.0.1:9"
    said = _push(_folder(tmp_path), stand_in)
    assert said.startswith("--push-to org/net, to http://127.0.0.1:9: ")
    assert "the files stay here; check the name, the network and HF_ENDPOINT" in said


def test_without_a_token_nothing_is_begun(tmp_path: Path, stand_in: Hub) -> None:
    said = _push(_folder(tmp_path), stand_in, token="")
    assert said == "--push-to org/net: nobody is logged in to the hub: `hf auth login`, or set HF_TOKEN"
    assert stand_in.asked == []


@pytest.fixture
def export(tmp_path: Path, stand_in: Hub, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`mimkd-ray export` of a small network into tmp_path/out, without timings."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", stand_in.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(examine, "latency_ms", lambda *_: {"1": 1.0, "32": 1.0})
    torch.save(build_model("cifar/resnet8_w4", 10).state_dict(), tmp_path / "w.pth")
    named = ("--network", "cifar/resnet8_w4", "--weights", str(tmp_path / "w.pth"), "--data.root", "digits")
    few = ("--images", "20", "--calibration", "1", "--formats", "pt2", "--out", str(tmp_path / "out"))
    return lambda *more: main(["export", *named, *few, *more])


def test_a_command_pushes_with_its_flag_alone(
    tmp_path: Path, stand_in: Hub, export: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert export() == 0
    assert stand_in.asked == []
    assert "pushed" not in capsys.readouterr().out
    assert export("--push-to", "org/net") == 0
    assert capsys.readouterr().out.endswith(f"exported to {tmp_path / 'out'}\npushed to org/net\n")
    assert stand_in.repositories == ["org/net"]
    assert stand_in.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_command_that_the_hub_refuses(
    tmp_path: Path, stand_in: Hub, export: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.refuses = True
    assert export("--push-to", "org/net") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--push-to org/net: the hub at {stand_in.endpoint} refuses: 403: " in line
    assert stand_in.files == {}
    assert (tmp_path / "out" / "student.pt2").exists()


def test_a_command_with_a_file_that_is_not_done_pushes_nothing(
    stand_in: Hub, export: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no such operation")

    monkeypatch.setattr(export_student, "write_pt2", broken)
    assert export("--push-to", "org/net") == 1
    assert (
        capsys.readouterr().err.splitlines()[-1].endswith(": nothing was pushed to org/net, as not all files are done")
    )
    assert stand_in.asked == []
