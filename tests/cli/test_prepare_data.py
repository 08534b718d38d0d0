"""jobs/prepare_data.py under Ray: killed and started again; its errors; the command line."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from jobs_here import ENVIRONMENT, run_and_kill
from PIL import Image

from mimkd_ray.cli import prepare_data as command_line
from mimkd_ray.config import PrepareConfig
from mimkd_ray.data.prepare.make_shards import prepare
from mimkd_ray.data.prepare.work_units import Done
from mimkd_ray.data.sources.shard_manifest import read_manifest
from mimkd_ray.errors import DamagedDataError, UserError
from mimkd_ray.on_ray import data_units
from mimkd_ray.storage import StorageError

ROOT = Path(__file__).parents[2]


def image(seed: int) -> bytes:
    out = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((40, 30)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 images of two classes, one of them damaged: 25 parts."""
    root = tmp_path_factory.mktemp("source")
    for i in range(400):
        path = root / "train" / ("cat", "dog")[i % 2] / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(i))
    (root / "train" / "cat" / "100.jpg").write_bytes(b"no image")
    return root


def command(source: Path, target: Path, *more: str) -> list[str]:
    job = [sys.executable, str(ROOT / "jobs" / "prepare_data.py"), "--source", str(source), "--target", str(target)]
    return [*job, "--block-rows", "16", "--shard-rows", "32", *more]


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_job_goes_on_and_ends_as_an_undisturbed_one(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed after the first part. The undisturbed one runs without Ray."""
    expected, target = tmp_path / "expected", tmp_path / "set"
    manifest = prepare(PrepareConfig(source=str(source), target=str(expected), block_rows=16, shard_rows=32))
    work = target / ".prepare-train"
    run_and_kill(command(source, target), lambda: any(work.glob("part-*.json")), tmp_path / "killed.log")
    parts = list(work.glob("part-*.json"))
    assert 1 <= len(parts) < 25
    assert read_manifest(str(target), "train") is None
    assert "checking images (25 of 25 parts to do)" in (tmp_path / "killed.log").read_text()
    done = subprocess.run(command(source, target), capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == f"checking images ({25 - len(parts)} of 25 parts to do)"
    assert "writing shards (13 of 13 to do)" in said
    assert re.fullmatch(r"  399 images, 100 %, [\d,]+ images/s, 0 s left", said[-3])
    assert "399 images of 2 classes" in said[-2]
    assert said[-1] == f"1 damaged images left out (see train.damaged.json); digest {manifest.digest}"
    assert files(target) == files(expected)
    assert command_line.main(command(source, target)[2:]) == 0
    assert capsys.readouterr().out.splitlines() == said[-2:], "a finished set only prints its summary"
    assert files(target) == files(expected)


# --- without Ray


def test_progress_says_how_much_and_how_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(data_units.time, "monotonic", lambda: now)
    with data_units.Progress("checking images", 2000) as progress:
        for seconds, rows, size in ((60.0, 100, 100), (5.0, 100, 100), (5.0, 40, 300), (40.0, 1000, 1500)):
            now += seconds
            progress.add(Done(rows, size))
    assert capsys.readouterr().out.splitlines() == [
        "checking images",
        "  100 images, 5 %",  # a minute, most of it Ray's
        "  240 images, 25 %, 14 images/s, 38 s left",  # 140 images and 400 bytes in 10 s, 1500 bytes to go
        "  1,240 images, 100 %, 23 images/s, 0 s left",
        "  1,240 images, 100 %, 23 images/s, 0 s left",
    ]
    progress.total_bytes = 5000
    assert progress.text(now).endswith("40 %, 23 images/s, 79 s left")
    progress.total_bytes = 50_000
    assert progress.text(now).endswith("4 %, 23 images/s, 21 min left")


def test_progress_on_a_terminal_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with data_units.Progress("checking images", 4000) as progress:
        for _ in range(4):
            time.sleep(0.12)  # a bar is drawn ten times a second at most
            progress.add(Done(50, 1000))
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.split("\r")[-1]
    assert re.match(r"checking images: 200 images, 100 %, [34]\d\d images/s, 0 s left \|.+\|", last)


@dataclass
class Failing:
    """Fails with these errors, one after the other, and then is done."""

    errors: list[Exception]
    bytes: int = 7

    def __call__(self) -> Done:
        if self.errors:
            raise self.errors.pop(0)
        return Done(3, self.bytes)


def answer(*errors: Exception) -> tuple[dict[str, object], list[float]]:
    waits: list[float] = []
    row = {"unit": data_units.ray.cloudpickle.dumps((Failing(list(errors)), None))}
    return data_units.do_unit(row, waits.append), waits


def test_storage_that_fails_is_waited_for() -> None:
    fine = {"error": "", "message": "", "rows": 3, "bytes": 7}
    assert answer() == (fine, [])
    assert answer(StorageError("a"), StorageError("b")) == (fine, [5.0, 20.0])
    last, waits = answer(*(StorageError(f"failure {n}") for n in range(4)))
    assert waits == [5.0, 20.0, 60.0]
    assert last["error"] == "StorageError"
    assert str(last["message"]).startswith("failure 3; start again")


def test_what_the_user_must_mend_is_not_tried_again() -> None:
    for error in (UserError("no space"), DamagedDataError("row group 3")):
        last, waits = answer(error)
        assert waits == []
        assert (last["error"], last["message"]) == (type(error).__name__, str(error))
    with pytest.raises(ZeroDivisionError):  # a fault of the program: Ray shows where
        answer(ZeroDivisionError())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "no such place", "--target", "y"], "no such place does not exist"),
        (["--source", "x", "--target", "y", "--shard-rows", "100"], "--shard-rows 100 is no multiple"),
        (["--source", "x", "--target", "y", "--workers", "-1"], "--workers -1: give 1 or more"),
    ],
)
def test_bad_input_is_one_line_and_status_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(arguments) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "x"], "--source"),
        (["--source", "x", "--target", "y", "--sede", "1"], "--sede"),
        (["--source", "x", "--target", "y", "--seed", "one"], "'one'"),
    ],
)
def test_bad_flags_are_told_by_tyro_and_status_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "--help" in captured.err
    assert captured.out == ""


def test_help_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for flag in ("--source", "--target", "--split", "--short-side", "--quality", "--address", "--workers"):
        assert flag in shown


@pytest.mark.parametrize(
    ("error", "status"), [(DamagedDataError("d"), 1), (StorageError("s"), 1), (KeyboardInterrupt(), 130)]
)
def test_status(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(job: object) -> None:
        raise error

    monkeypatch.setattr(command_line, "prepare_with_ray", fail)
    assert command_line.main(["--source", "x", "--target", "y"]) == status
    assert len(capsys.readouterr().err.splitlines()) == 1
