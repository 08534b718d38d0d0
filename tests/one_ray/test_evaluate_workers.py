"""Evaluation by workers of Ray finds what one process finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from jobs_here import TAKES_LONG
from safetensors.torch import save_file

from mimkd_ray.__main__ import main
from mimkd_ray.models.build_model import build_model

FAST = ("--eval.rows", 90, "--eval.train-rows", 0, "--eval.tap-rows", 0)
STUDENT = ("--student.name", "cifar/resnet8", "--data.root", "digits", "--data.pipeline", "none", *FAST)
TWO = ("--launch.backend", "ray", "--launch.workers", 2, "--launch.gpu", "off", "--launch.cpus-per-worker", 1)


@TAKES_LONG
@pytest.mark.ray
def test_two_workers_find_what_one_process_finds(cluster: str, tmp_path: Path) -> None:
    weights = tmp_path / "student.safetensors"
    torch.manual_seed(3)
    save_file(build_model("cifar/resnet8", 10).state_dict(), weights)
    for name, more in (("one", ()), ("two", (*TWO, "--launch.address", cluster))):
        arguments = (*STUDENT, "--student.weights", weights, "--eval.out", tmp_path / name, *more)
        assert main(["evaluate", *map(str, arguments)]) == 0
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    assert one["rows"] == 90
    assert _close(one, two)
    tables = [pq.read_table(tmp_path / name / "predictions.parquet").sort_by("id") for name in ("one", "two")]
    assert tables[0]["prediction"].equals(tables[1]["prediction"])


@TAKES_LONG
@pytest.mark.ray
def test_a_workers_bad_input_is_a_line(cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = ("--student.weights", "no.safetensors", "--eval.out", tmp_path, "--launch.address", cluster)
    assert main(["evaluate", *map(str, (*STUDENT, *TWO, *missing))]) == 2
    assert "no.safetensors" in capsys.readouterr().err


def _close(one: Any, two: Any) -> bool:
    """Whether two values of JSON agree, floats to a millionth."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_close(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(_close, one, two))
    return one == pytest.approx(two, rel=1e-6) if isinstance(one, float) else one == two
