"""What Ray prints goes to ray.log, or with --verbose to people."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mimkd_ray import console, storage
from mimkd_ray.cli.command_line import parse
from mimkd_ray.errors import UserError
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


def test_the_log_of_a_failed_job_is_kept_and_costs_no_job_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    url = f"memory://{tmp_path.name}"
    with pytest.raises(ZeroDivisionError), ray_in_file(url, verbose=False):
        os.write(1, b"why it failed\n") // 0
    assert storage.read_bytes(f"{url}/ray.log") == b"why it failed\n"

    def away(*_: object) -> None:
        raise storage.StorageError("the store is away")

    monkeypatch.setattr(storage, "upload", away)
    with ray_in_file(url, verbose=False):
        console.line("a good run")
    assert capfd.readouterr().out.splitlines() == ["a good run", "what Ray printed is not kept: the store is away"]


def test_a_folder_that_cannot_be_made_is_one_line() -> None:
    told = r"cannot write /proc/none/ray\.log: .*; give a place in which folders and"
    with pytest.raises(UserError, match=told), ray_in_file("/proc/none", verbose=False):
        pytest.fail("began")
