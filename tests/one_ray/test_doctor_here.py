"""`python -m mimkd_ray doctor` on a good set-up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mimkd_ray.__main__ import main

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_good_machine_passes_and_leaves_nothing_behind(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, result = tmp_path / "runs", tmp_path / "doctor.json"
    places = ["--root", str(root), "--store", str(tmp_path / "store"), "--store-gb", "0.001"]
    assert main(["doctor", "--address", cluster, *places, "--workers", "2", "--json", str(result)]) == 0
    said = capsys.readouterr().out
    kinds = [line.split()[1].rstrip(":") for line in said.splitlines() if line.startswith(("pass", "warn"))]
    everything = ["versions", "gpus", "authentication", "clock", "memory", "disk", "decode", "storage", "all-reduce"]
    everything.append("links")
    assert kinds == everything
    assert "warn  authentication: RAY_AUTH_MODE is disabled" in said, "as these tests have it"
    assert "gloo over processes of one node: 64 MB in" in said
    assert said.splitlines()[-1].endswith("0 failed")
    assert list(root.iterdir()) == []
    written = json.loads(result.read_text())
    assert (written["ok"], [check["check"] for check in written["checks"]]) == (True, everything)
