"""`python -m mimkd_ray doctor` as it is called: on a good set-up and on broken ones."""

from __future__ import annotations

import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import ray
from jobs_here import ENVIRONMENT, TAKES_LONG
from ray.cluster_utils import Cluster
from ray.exceptions import GetTimeoutError, RayTaskError

from mimkd_ray.__main__ import main
from mimkd_ray.config import DoctorConfig
from mimkd_ray.on_ray.nodes import doctor_on_nodes


@TAKES_LONG
@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_with_a_head_without_cpus_and_broken_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RAY_AUTH_MODE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    options = {"object_store_memory": 100_000_000}
    nodes = Cluster(initialize_head=True, head_node_args={**options, "num_cpus": 0, "include_dashboard": False})
    try:
        nodes.add_node(**options, num_cpus=2)
        places = ["--root", "/proc/none", "--store", str(tmp_path / "store"), "--store-gb", "1000000"]
        assert main(["doctor", "--address", nodes.address, *places]) == 1
        shown = capsys.readouterr().out.splitlines()
        failed = [line for line in shown if line.startswith("fail")]
        assert sum("fail  disk [" in line and "--data.store-gb" in line for line in failed) == 2
        assert sum("fail  storage [" in line for line in failed) == 1
        assert len(failed) == 3, failed
        assert any(line.startswith("pass  versions: 2 nodes") for line in shown)
        # Both nodes in one line, or a line each if one decodes too slowly, as a busy machine may.
        decoded = [line for line in shown if line.startswith(("pass  decode", "warn  decode"))]
        assert len(decoded) == (1 if "decode: 2 times; the slowest, " in decoded[0] else 2)
        assert any("gloo over 2 nodes" in line for line in shown)
    finally:
        ray.shutdown()
        nodes.shutdown()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            RayTaskError("measure", "Traceback\n  in link.py\nRuntimeError: NCCL error 2", RuntimeError()),
            "RuntimeError: NCCL",
        ),
        (GetTimeoutError("none"), r"no answer in 5 s \(GetTimeoutError\)"),
    ],
)
def test_what_ends_the_all_reduce_is_told(error: Exception, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    visit = doctor_on_nodes._Visit.__new__(doctor_on_nodes._Visit)
    visit.config = DoctorConfig(workers=2, wait_seconds=5)
    visit.examiners = {doctor_on_nodes.Node(ray_id="0" * 56, name="n", cpus=2, gpus=0, object_store_bytes=0): None}
    for name, value in {"remote": Mock(), "kill": Mock(), "get": Mock(side_effect=error)}.items():
        monkeypatch.setattr(doctor_on_nodes.ray, name, value)
    assert re.match(rf"gloo over processes of one node: {told}", visit._all_reduce().text)


def test_bad_input_is_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--store-gb", "-1"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "--store-gb is -1.0: give 0 or more" in said
    assert main(["doctor", "--rot", "x"]) == 2
    assert "Unrecognized options: --rot, x" in capsys.readouterr().err
