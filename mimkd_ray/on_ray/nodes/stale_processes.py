"""Processes of a Ray that a run started: its agents outlive the run by up to a minute if it is killed, and those of a
start that failed stay until the run ends."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import ray

from mimkd_ray import console, run_lock
from mimkd_ray.errors import count
from mimkd_ray.on_ray.nodes.environment import OWNER


def end_left_behind() -> None:
    """End the processes of Ray on this machine whose run is dead, and say so."""
    ended = _end(lambda pid, identity: run_lock.process(pid) != identity)
    if ended:
        console.line(f"ended {count(ended, 'process', 'processes')} of Ray that a killed run had left behind")


def end_failed_start() -> None:
    """End the processes of this run's Ray, which has not come up: ray.shutdown knows nothing of it."""
    _end(lambda pid, identity: pid == os.getpid() and run_lock.process(pid) == identity)


def _end(wanted: Callable[[int, str], bool]) -> int:
    ended = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            pid, _, identity = _owner(process).partition(" ")
            # One of another container has a number of another set.
            if identity.startswith(f"{run_lock.namespace()} ") and wanted(int(pid), identity):
                os.kill(int(process.name), signal.SIGKILL)
                ended += 1
    return ended


def _owner(process: Path) -> str:
    """Return the run that started this process of Ray; "" for other processes, which may be meant to go on."""
    command = (process / "cmdline").read_bytes()
    if not command.startswith(b"ray::") and f"{Path(ray.__file__).parent}/".encode() not in command:
        return ""
    environment = (process / "environ").read_bytes().split(b"\0")
    owners = [each.decode().partition("=")[2] for each in environment if each.startswith(f"{OWNER}=".encode())]
    return owners[0] if owners else ""
