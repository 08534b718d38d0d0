"""The example under Ray runs, and trains what it says."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from jobs_here import ROOT, TAKES_LONG


@TAKES_LONG
@pytest.mark.ray
@pytest.mark.slow
def test_own_dataset_on_ray(joined: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module
    result = example("own_dataset_on_ray").main(str(tmp_path), epochs=2)
    assert result["student"]["top1"] > 20  # a tenth by chance; two epochs
    assert result["workers"] == 2
