"""Processes of a Ray that a run started: its agents outlive the run by up to a minute if it is killed."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import ray

from mimkd_ray import console, run_lock
from mimkd_ray.errors import count
from mimkd_ray.on_ray.nodes.environment import OWNER


def end_left_behind() -> None:
    """End the processes of Ray on this machine whose run is dead, and say so."""
    ended = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if _is_left_behind(process):
                os.kill(int(process.name), signal.SIGKILL)
                ended += 1
    if ended:
        console.line(f"ended {count(ended, 'process', 'processes')} of Ray that a killed run had left behind")


def _is_left_behind(process: Path) -> bool:
    command = (process / "cmdline").read_bytes()
    if not command.startswith(b"ray::") and f"{Path(ray.__file__).parent}/".encode() not in command:
        return False  # a program that the run started, which may be meant to go on
    environment = (process / "environ").read_bytes().split(b"\0")
    owners = [each.decode().partition("=")[2] for each in environment if each.startswith(f"{OWNER}=".encode())]
    pid, _, identity = (owners or [""])[0].partition(" ")
    here = identity.startswith(f"{run_lock.namespace()} ")  # else it is a number of another container
    return here and run_lock.process(int(pid)) != identity
