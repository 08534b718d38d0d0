"""The console of a job under Ray, on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path

import pytest
from jobs_here import ENVIRONMENT, JOB, small


def on_terminal(command: list[str], columns: int) -> tuple[int, str]:
    """Run a command on a terminal of its own; its status, and what it wrote."""
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe(command[0], command, ENVIRONMENT)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    written = b""
    try:
        while part := os.read(terminal, 65536):
            written += part
    except OSError:  # it has ended
        pass
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), written.decode(errors="replace")


@pytest.mark.ray
@pytest.mark.slow
def test_the_driver_has_the_bar_and_rays_lines_are_in_a_file(tmp_path: Path) -> None:
    status, said = on_terminal([sys.executable, JOB, *small(tmp_path, "--launch.workers", "2")], 140)
    assert status == 0, said
    text = re.sub(r"\x1b\[\w", "", said).replace("\r", "\n")
    assert re.search(r"^demo +\d+%\|[#█▏▎▍▌▋▊▉ ]{20}\| \d+ of 20 steps", text, re.M), text
    assert re.search(r"^cross-entropy \d.*global\S* [-\d.]+ of at most", text, re.M), text
    for line in ("starting Ray", "starting workers", "2 workers on CPU.*", "demo: epoch 2, held-out top-1.*"):
        assert len(re.findall(f"^{line}$", text, re.M)) == 1, text
    assert "pid=" not in text
    assert "RayTrainWorker" not in text
    log = (tmp_path / "small/ray.log").read_text()
    assert "RayTrainWorker" in log
    assert "demo: epoch" not in log
