"""What Ray prints goes to ray.log, or with --verbose to people."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mimkd_ray import console
from mimkd_ray.cli.common import parse
from mimkd_ray.on_ray.driver_console import ray_in_file
from mimkd_ray.recipes import demo

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("words", [[], ["--verbose"]])
def test_what_ray_prints(words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = parse({"demo": demo}, "demo", words, "train")
    assert config is not None
    with ray_in_file(str(tmp_path), config.launch.verbose):
        os.write(1, b"by a thread of C++\n")
        print("by Python", flush=True)
        console.line("by a run")
    shown = capfd.readouterr().out.splitlines()
    logged = (tmp_path / "ray.log").read_text().splitlines() if (tmp_path / "ray.log").exists() else []
    rays = ["by a thread of C++", "by Python"]
    assert (shown, logged) == (([*rays, "by a run"], []) if words else (["by a run"], rays))
