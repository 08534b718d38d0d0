from __future__ import annotations

import os
from pathlib import Path

import pytest

from mimkd_ray.data.loading import cpu_quota
from mimkd_ray.data.loading.cpu_quota import usable_cores


def test_cores_are_those_of_the_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    for text, expected in (("max 100000", 16), ("350000 100000", 3), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(text)
        monkeypatch.setattr(cpu_quota, "QUOTA", tmp_path / "cpu.max")
        assert usable_cores() == expected
    monkeypatch.setattr(cpu_quota, "QUOTA", tmp_path / "none")
    monkeypatch.setattr(cpu_quota, "QUOTA_V1", (tmp_path / "quota", tmp_path / "period"))
    assert usable_cores() == 16
    for text, expected in (("-1", 16), ("350000", 3)):  # the first version of control groups
        (tmp_path / "quota").write_text(text)
        (tmp_path / "period").write_text("100000\n")
        assert usable_cores() == expected
