"""`python -m mimkd_ray doctor` on a good set-up."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jobs_here import TAKES_LONG

from mimkd_ray.__main__ import main
from mimkd_ray.config import DoctorConfig
from mimkd_ray.doctor.link import LinkSpeed
from mimkd_ray.on_ray.nodes import doctor_on_nodes

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


@TAKES_LONG
def test_ranks_of_one_node_talk_by_its_loopback(joined: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Told(doctor_on_nodes.Rank):
        """A rank that gives the interface in place of its time. Local, so that Ray sends it by value."""

        def measure(self, *arguments: Any) -> LinkSpeed:
            speed = super().measure(*arguments)
            return replace(speed, error=speed.error or f"by {os.environ.get('GLOO_SOCKET_IFNAME')}")

    monkeypatch.setattr(doctor_on_nodes, "Rank", Told)
    (outcome,) = [
        one for one in doctor_on_nodes.cluster(DoctorConfig(workers=2, store_gb=0.001)) if one.check == "all-reduce"
    ]
    assert "2 of 2 ranks failed; rank 0: by lo" in outcome.text
