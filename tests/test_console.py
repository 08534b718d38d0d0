from __future__ import annotations

import fcntl
import io
import itertools
import os
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jobs_here import ENVIRONMENT, JOB, small

from mimkd_ray import console
from mimkd_ray.cli import training
from mimkd_ray.cli.training import run
from mimkd_ray.config import Config, LaunchConfig, RunConfig
from mimkd_ray.console import Shown, Status, clock
from mimkd_ray.errors import UserError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What a console without a terminal prints."""
    out = io.StringIO()
    before = console.use(Shown(out, io.StringIO()))
    yield out
    console.use(before)


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]


def test_a_phase_says_that_it_begins_and_is_never_silent(lines: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "SILENCE_SECONDS", 0.5)
    before = {*threading.enumerate()}
    with console.phase("outer", said=False), console.phase("checking"):
        time.sleep(1.7)  # inside a library that says nothing
    said = lines.getvalue().splitlines()
    assert said[0] == "checking"
    assert said[1].startswith("checking: goes on, 0:00:0")
    count = len(said)
    time.sleep(1.3)
    assert len(lines.getvalue().splitlines()) == count  # nothing goes on now
    assert {*threading.enumerate()} <= before, "and nobody looks whether it does"


def test_a_terminal_without_a_size_gets_lines() -> None:
    ours, theirs = os.openpty()
    try:
        with open(theirs, "w", closefd=False) as terminal:
            shown = Shown(io.StringIO(), terminal)
            assert shown.every == console.LINE_SECONDS
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
            assert shown.every == console.BAR_SECONDS
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_counted_phase_tells_rate_and_time_left(lines: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    console.use(Shown(lines, io.StringIO()))
    for _ in console.counted(range(40), lambda _: 100, "held-out images", 4000):
        now[0] += 1.0
    assert lines.getvalue().splitlines()[:2] == [
        "held-out images: 800 of 4,000 images, 100 images/s, 0:00:32 left",
        "held-out images: 1,600 of 4,000 images, 100 images/s, 0:00:24 left",
    ]


def test_stale_rates_and_work_without_a_count_are_not_told(lines: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep))
    monkeypatch.setattr(console, "LOOK_SECONDS", 0.01)
    console.use(Shown(lines, io.StringIO()))
    with console.phase("demo", said=False):
        now[0] += 8
        console.show(Status("steps", 3, 9, "steps", 80.0, 60.0, "cross-entropy 1.2"))
        for told in (1, 2, 3):
            now[0] += 9  # more than SILENCE_SECONDS
            deadline = time.monotonic() + 30
            while len(lines.getvalue().splitlines()) <= told and time.monotonic() < deadline:
                time.sleep(0.01)
        console.show(None)
    assert lines.getvalue().splitlines() == [
        "steps: 3 of 9 steps, 80 images/s, 0:01:00 left, cross-entropy 1.2",
        "steps: 3 of 9 steps, 80 images/s, 0:00:51 left, cross-entropy 1.2",
        "steps: 3 of 9 steps, 80 images/s, 0:00:42 left, cross-entropy 1.2",
        "steps: 3 of 9 steps, cross-entropy 1.2, 0:00:27 so far",
    ]


def test_the_bar_has_room_and_every_figure_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    screen = Terminal()
    shown = Shown(io.StringIO(), screen)
    figures = "cross-entropy 1.234, KD 0.512, global 3.12 of at most 4.16 nats, held-out top-1 61.20 %"
    shown.status(Status("demo mimkd seed 3", 216, 480, "steps", 812.0, 75.0, figures))
    text = re.sub(r"\x1b\[\w", "", screen.getvalue())
    assert "demo mimkd seed 3  45%|#########           | 216 of 480 steps, 812 images/s, 0:01:15 left" in text
    assert figures in text
    shown.status(None)


@pytest.mark.slow
def test_no_job_is_silent_for_ten_seconds(tmp_path: Path) -> None:
    command = [sys.executable, "-u", JOB, *small(tmp_path, "--launch.backend", "local", "--train.epochs", "2")]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    stamps, text = [began], []
    for line in process.stdout:
        stamps.append(time.monotonic())
        text.append(line)
    assert process.wait() == 0
    said = "".join(text)
    assert text[0] == "demo: cifar/resnet8 teaches cifar/resnet8_w4; loading PyTorch\n"
    assert max(b - a for a, b in itertools.pairwise(stamps)) < 10.5, said  # the watch looks every second
    for word in ("teacher  ", "student  ", "data  ", "views  ", "batch  ", "device  ", "results  "):
        assert f"\n  {word}" in said
    order = ["checking data, networks and places", "1 worker on CPU", "checking cifar/resnet8 on 450 held-out images"]
    order += ["epoch 2, held-out top-1", "top-1 %", "run directory"]
    assert [said.index(each) for each in order] == sorted(said.index(each) for each in order)


def test_what_is_said_once_is_said_again_in_the_next_run(caplog: pytest.LogCaptureFixture) -> None:
    console.told.clear()
    for _ in range(2):
        console.say_once("2 files passed over")
    with pytest.raises(UserError, match="given as objects of this process"):
        run(Config(), [(torch.zeros(3, 8, 8), 0)])  # type: ignore[arg-type]
    console.say_once("2 files passed over")
    assert caplog.messages == ["2 files passed over"] * 2


def test_a_place_that_takes_long_to_look_at_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    going: list[str] = []

    class Heard(console.Nobody):
        def status(self, status: Status | None) -> None:
            going.append(status.what if status is not None else "")

    def stands_still(run_dir: str) -> None:
        assert going[-1] == f"looking at {run_dir}"
        raise UserError("it is away")

    monkeypatch.setattr(training, "check_free", stands_still)
    before = console.use(Heard())
    with pytest.raises(UserError, match="it is away"):
        run(Config(run=RunConfig(root=str(tmp_path)), launch=LaunchConfig(backend="local")))
    console.use(before)
