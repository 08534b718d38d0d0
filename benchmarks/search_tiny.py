"""Many tiny trials in one search, on a Ray that outlives it: memory during the search, and remains at the end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from children import tree
from report import table

from mimkd_ray.config import SearchConfig
from mimkd_ray.config.form.json_form import to_dict
from mimkd_ray.config.jobs.search import search_job
from mimkd_ray.on_ray.nodes.environment import EMBEDDED
from mimkd_ray.recipes import demo

ROOT = Path(__file__).resolve().parents[1]
POINTS = 20
SAMPLE_SECONDS = 1.0
SETTLE_SECONDS = 30.0
"""Seconds for Ray to end the workers of a finished job in the background."""
MARK = "MIMKD_BENCHMARK"
"""Environment variable that all processes of this benchmark inherit, loaders and orphans too."""

LEFT = """
import json, sys, ray
from ray.util import placement_group_table
ray.init(address=sys.argv[1], logging_level="error", log_to_driver=False)
states = [group["state"] for group in placement_group_table().values()]
print(json.dumps({"states": states, "cpus": ray.available_resources().get("CPU", 0)}))
"""


class Sample(NamedTuple):
    """Megabytes in memory after a number of finished trials."""

    seconds: float
    over: int
    driver: float
    head: float
    trials: float


def environment() -> dict[str, str]:
    """Return this process's environment without settings for another Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OMP_"))}
    return kept | {"RAY_USAGE_STATS_ENABLED": "0"}


def tiny(trials: int, cores: int, folder: Path) -> dict[str, float]:
    """Run the search; return the figures of its memory, its speed and its remains."""
    config = folder / "tiny.json"
    config.write_text(json.dumps(_job(trials, folder)))
    mark = uuid.uuid4().hex
    inherited = environment() | EMBEDDED | {"RAY_AUTH_MODE": "disabled", MARK: mark}
    with _head(inherited, cores) as (address, head):
        before = _marked(mark)
        command = [sys.executable, str(ROOT / "jobs" / "search.py"), "--config", str(config)]
        command += ["--launch.address", address, "--search.trials"]
        log = folder / "tiny.log"
        began = time.monotonic()
        with log.open("wb") as out:
            driver = subprocess.Popen([*command, str(trials)], env=inherited, stdout=out, stderr=subprocess.STDOUT)
            samples = _watch(driver, head, folder / "tiny", trials)
        seconds = time.monotonic() - began
        if driver.returncode:
            raise SystemExit(f"the tiny search ended with {driver.returncode}:\n{log.read_text()[-3000:]}")
        leaked = _leaked(mark, before)
        for pid, command_line in leaked.items():
            print(f"left at the end: process {pid}, {command_line}", flush=True)
        asked = subprocess.run(
            [sys.executable, "-c", LEFT, address], env=inherited, capture_output=True, text=True, check=True
        )
        left = json.loads(asked.stdout.splitlines()[-1])
    states = _ends(folder / "tiny")
    return {
        "tiny/trials_ended": len(states),
        "tiny/trials_failed": states.count("failed"),
        "tiny/seconds": seconds,
        "tiny/seconds_a_trial": seconds / trials,
        **_memory(samples, trials),
        "tiny/leaked_processes": len(leaked),
        "tiny/placement_groups": len(left["states"]),
        "tiny/leaked_placement_groups": sum(state != "REMOVED" for state in left["states"]),
        "tiny/cpus_taken": cores - left["cpus"],
    }


def _job(trials: int, folder: Path) -> dict[str, object]:
    base = to_dict(search_job(demo(), search=SearchConfig(trials=trials, algorithm="random", finalists=0)))
    base["data"] |= {"subset": 60, "pipeline": "none"}
    base["student"] |= {"name": "cifar/resnet8_w4"}
    base["teacher"] |= {"name": "cifar/resnet8", "train": False, "allow_chance": True}
    base["train"] |= {"lanes": 1, "lane_batch": 20, "epochs": 1, "eval_every": 1, "information_rows": 32}
    base["compare"] |= {"seeds": 0}
    base["launch"] |= {"workers": 1, "gpu": "off"}
    base["run"] |= {"root": str(folder), "name": "tiny", "checkpoint_every": 1}
    base["search"] |= {"scheduler": "none"}
    return base


@contextmanager
def _head(inherited: Mapping[str, str], cores: int) -> Iterator[tuple[str, int]]:
    """Run a Ray head; yield its address, and the process that is the ancestor of all its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    # A short path: it contains sockets, whose names have at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port", str(port)]
        command += ["--node-ip-address", "127.0.0.1", "--num-cpus", str(cores), "--num-gpus", "0"]
        command += ["--include-dashboard", "false", "--disable-usage-stats", "--temp-dir", scratch]
        process = subprocess.Popen(
            command,
            env=dict(inherited),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            _until_up(process, inherited, address)
            yield address, process.pid
        finally:
            pids = tree(process.pid)
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def _until_up(process: subprocess.Popen[bytes], inherited: Mapping[str, str], address: str) -> None:
    """Wait for the head; all its idle workers are there afterwards."""
    for _ in range(30):
        if process.poll() is not None:
            raise SystemExit(f"ray start ended with {process.returncode}")
        command = [sys.executable, "-c", LEFT, address]
        if subprocess.run(command, env=dict(inherited), capture_output=True, check=False).returncode == 0:
            return
        time.sleep(1)
    raise SystemExit(f"no Ray head came up at {address}")


def _ends(folder: Path) -> list[str]:
    """Return the states of the trials that have ended."""
    states = [json.loads(file.read_text())["state"] for file in folder.glob("trials/*.json")]
    return [state for state in states if state != "running"]


def _watch(driver: subprocess.Popen[bytes], head: int, folder: Path, trials: int) -> list[Sample]:
    """Sample memory until the driver ends."""
    samples: list[Sample] = []
    began = shown = time.monotonic()
    while driver.poll() is None:
        over = len(_ends(folder))
        below = {pid: _read(pid, "comm").strip() for pid in tree(head)}
        servers = [pid for pid, name in below.items() if name in ("gcs_server", "raylet")]
        workers = [pid for pid, name in below.items() if name.startswith("ray::") and "IDLE" not in name]
        now = time.monotonic()
        memory = (_megabytes([driver.pid]), _megabytes(servers), _megabytes(workers))
        samples.append(Sample(now - began, over, *memory))
        if now - shown > 10:
            shown = now
            print(f"{over} of {trials} tiny trials over in {now - began:.0f} s", flush=True)
        time.sleep(SAMPLE_SECONDS)
    return samples


def _memory(samples: Sequence[Sample], trials: int) -> dict[str, float]:
    """Return the memory at each twentieth of the trials, as a table and as figures, and its growth from a quarter to
    all.

    Each value is of the first sample with that many trials. The driver's memory at the end, with the report of all
    trials, is shown beside them.
    """
    marks = [-(-trials * point // POINTS) for point in range(1, POINTS + 1)]
    # The last sample before the driver ended may have seen all but the last trial.
    at = {mark: next((s for s in samples if s.over >= mark), samples[-1]) for mark in marks}
    rows = [[mark, *(float(value) for value in (s.seconds, s.driver, s.head, s.trials))] for mark, s in at.items()]
    print("\n" + table(["trials over", "seconds", "driver MB", "head MB", "trials MB"], rows) + "\n", flush=True)
    figures = {
        f"tiny/{name}_megabytes_at_{mark}": float(getattr(s, name))
        for mark, s in at.items()
        for name in ("driver", "head", "trials")
    }
    quarter, end = at[marks[POINTS // 4 - 1]], at[marks[-1]]
    growth = {
        f"tiny/{name}_growth_megabytes": getattr(end, name) - getattr(quarter, name) for name in ("driver", "head")
    }
    half = at[marks[POINTS // 2 - 1]]
    pace = (end.seconds - half.seconds) / max(1, end.over - half.over)
    earlier = max(SAMPLE_SECONDS, half.seconds - quarter.seconds) / max(1, half.over - quarter.over)
    figures["tiny/driver_megabytes_in_the_end"] = samples[-1].driver
    return figures | growth | {"tiny/seconds_a_trial_second_half_over_second_quarter": pace / earlier}


def _leaked(mark: str, before: set[int]) -> dict[int, str]:
    """Return new processes with our mark, after Ray had time to end its own, with their commands.

    Idle workers that Ray keeps ready for the next job belong to it.
    """
    until = time.monotonic() + SETTLE_SECONDS
    while True:
        found = {pid: _read(pid, "cmdline").replace("\0", " ").strip() for pid in _marked(mark) - before}
        found = {pid: text for pid, text in found.items() if text and not text.startswith("ray::IDLE")}
        if not found or time.monotonic() > until:
            return found
        time.sleep(1)


def _marked(mark: str) -> set[int]:
    """Return all living processes that inherited the mark."""
    entry = f"{MARK}={mark}"
    return {int(place.name) for place in Path("/proc").glob("[0-9]*") if entry in _read(int(place.name), "environ")}


def _megabytes(pids: Sequence[int]) -> float:
    """Return the resident memory of the processes together."""
    pages = [int(text.split()[1]) for text in (_read(pid, "statm") for pid in pids) if text]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _read(pid: int, name: str) -> str:
    """Return a file of a process; "" if it has ended or belongs to another user."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""
