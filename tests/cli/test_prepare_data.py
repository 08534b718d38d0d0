"""The preparation of data: its progress, its errors, its command line. tests/one_ray has it under Ray, and killed."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from mimkd_ray import console
from mimkd_ray.cli import prepare_data
from mimkd_ray.data.prepare.work_units import Done
from mimkd_ray.errors import DamagedDataError, UserError
from mimkd_ray.on_ray import run_work_units
from mimkd_ray.run_lock import InUse
from mimkd_ray.storage import AccessError, StorageError

ROOT = Path(__file__).parents[2]


def test_progress_says_how_much_and_how_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(run_work_units.time, "monotonic", lambda: now)
    with run_work_units.Progress("checking images", 2 * 10**9) as progress:
        for seconds, rows, size in ((60.0, 100, 100), (5.0, 100, 100), (5.0, 40, 300), (40.0, 1000, 1500)):
            now += seconds
            progress.add(Done(rows, size * 10**6))
    assert capsys.readouterr().out.splitlines() == [
        "checking images",
        "checking images: 100 of 2,000 MB",  # a minute, most of it Ray's
        "checking images: 500 of 2,000 MB, 14 images/s, 0:00:38 left",  # 140 images, 400 MB in 10 s, 1500 MB to go
        "checking images: 2,000 of 2,000 MB, 23 images/s, 0:00:00 left",
        "  1,240 images in 0:01:50",
    ]


def test_progress_on_a_terminal_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(console, "BAR_SECONDS", 0.0)
    with run_work_units.Progress("checking images", 4_000_000) as progress:
        for _ in range(3):
            progress.add(Done(50, 1_000_000))
    captured = capsys.readouterr()
    assert captured.out.startswith("checking images\n")
    assert re.search(r"checking images +75%\|\S+ +\| 3 of 4 MB", captured.err)
    assert re.search(r"3 of 4 MB, [\d,]+ images/s, 0:00:00 left", captured.err)
    assert captured.out.endswith("  150 images in 0:00:00\n")


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
    row = {"unit": run_work_units.ray.cloudpickle.dumps((Failing(list(errors)), None))}
    return run_work_units.do_unit(row, waits.append), waits


def test_storage_that_fails_is_waited_for() -> None:
    fine = {"error": "", "message": "", "rows": 3, "bytes": 7}
    assert answer() == (fine, [])
    assert answer(StorageError("a"), StorageError("b")) == (fine, [5.0, 20.0])
    last, waits = answer(*(StorageError(f"failure {n}") for n in range(4)))
    assert waits == [5.0, 20.0, 60.0]
    assert last["error"] == "StorageError"
    assert str(last["message"]).startswith("failure 3; start again")


def test_what_the_user_must_mend_is_not_tried_again() -> None:
    known = {UserError("no space"): "UserError", DamagedDataError("row 3"): "DamagedDataError"}
    for error, kind in {**known, InUse("a folder"): "UserError", AccessError("no key"): "AccessError"}.items():
        last, waits = answer(error)
        assert waits == []
        assert (last["error"], last["message"]) == (kind, str(error))
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
    assert prepare_data.main(arguments) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert captured.out in ("", "split 'train' of no such place: looking what is there\n")


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
    assert prepare_data.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "--help" in captured.err
    assert captured.out == ""


def test_help_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare_data.main(["--help"]) == 0
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

    monkeypatch.setattr(prepare_data, "prepare_with_ray", fail)
    assert prepare_data.main(["--source", "x", "--target", "y"]) == status
    assert len(capsys.readouterr().err.splitlines()) == 1
