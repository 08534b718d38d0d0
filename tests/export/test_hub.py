"""Pushing to a stand-in of the hub, in a process that knows it by HF_ENDPOINT."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stand_in import TOKEN, Hub
from hub_stand_in import stand_in as stand_in

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


def test_without_a_token_nothing_is_begun(tmp_path: Path, stand_in: Hub) -> None:
    said = _push(_folder(tmp_path), stand_in, token="")
    assert said == "--push-to org/net: nobody is logged in to the hub: `hf auth login`, or set HF_TOKEN"
    assert stand_in.asked == []
