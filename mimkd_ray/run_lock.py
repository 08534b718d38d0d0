"""A lock on the directory of a run or a search, or another place: two starts of one command must not write there at
once.

lock.json says who holds it. The owner writes it again every BEAT_SECONDS; when it ends the file goes. One that was left
behind by a kill is taken over: at once if its process was on this machine, else once it has been seen not to beat.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mimkd_ray import storage
from mimkd_ray.errors import UserError
from mimkd_ray.json_files import read_if_sound

logger = logging.getLogger(__name__)

LOCK = "lock.json"
BEAT_SECONDS = 10.0
WATCH_SECONDS = 3 * BEAT_SECONDS
"""A lock of another machine that does not beat in this time is a dead one's. Clocks are not compared."""
SETTLE_SECONDS = 0.5
"""Two may take over a dead one's lock at the same moment: the later one's stays, and both look again after this."""


TRIES = 5


class InUse(UserError):
    """A living process holds the directory."""

    holder = ""
    """Which one, and where."""


def check_free(run_dir: str, name: str = LOCK, otherwise: str = "--run.name") -> None:
    """Raise InUse if a living process holds the directory, and remove the lock of a dead one. Takes WATCH_SECONDS
    where the lock is another machine's. ``name``: the lock's; ``otherwise``: the flag that names another place."""
    url = storage.join(run_dir, name)
    if not storage.exists(url):
        return
    there = _read(url)
    if there is None or not _alive(url, there):
        with suppress(UserError, OSError):  # on a disk that cannot be written the result of a run can still be read
            storage.remove_file(url)
        return
    holder = f"process {there.get('pid')} on {there.get('host')}"
    error = InUse(
        f"{run_dir} is in use by {holder}, started {there.get('started')}: "
        f"wait for it or stop it, or pass another {otherwise}; if there is no such process, remove {url}"
    )
    error.holder = holder
    raise error


@contextmanager
def held(run_dir: str, name: str = LOCK, otherwise: str = "--run.name") -> Iterator[None]:
    """Hold the lock of a directory during the with-block. Raises InUse as `check_free` does."""
    url = storage.join(run_dir, name)
    mine = {
        "owner": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process": process(os.getpid()),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    if not storage.create_once(url, _json(mine, 0)):
        for _ in range(TRIES):  # another one may take over the lock, and die too
            check_free(run_dir, name, otherwise)
            storage.create_once(url, _json(mine, 0))
            time.sleep(SETTLE_SECONDS)
            if (_read(url) or {}).get("owner") == mine["owner"]:
                break
        else:
            raise UserError(f"{url} was taken by others {TRIES} times, and left by them: remove it and start again")
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(url, mine, ended), name="lock", daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join(BEAT_SECONDS)
        try:
            with storage.hurried():
                if (_read(url) or {}).get("owner") == mine["owner"]:
                    storage.remove_file(url)
        except (storage.StorageError, storage.AccessError) as error:  # how the run ended is what matters
            logger.warning("the lock stays: %s", error)


def _beat(url: str, mine: dict[str, Any], ended: threading.Event) -> None:
    beats = 0
    while not ended.wait(BEAT_SECONDS):
        beats += 1
        try:
            if (_read(url) or mine).get("owner") != mine["owner"]:
                logger.warning("%s was taken over by another process: this one should be stopped", url)
                return
            storage.write_bytes(url, _json(mine, beats))
        except Exception as error:  # whatever it is, the next beat may succeed
            logger.warning("cannot renew %s: %s", url, error)


def _alive(url: str, there: dict[str, Any]) -> bool:
    if there.get("host") == socket.gethostname() and str(there.get("process")).startswith(namespace()):
        return there.get("process") == process(there["pid"])
    print(f"looking for {WATCH_SECONDS:.0f} s whether {there.get('host')} still holds {url}", flush=True)
    until = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < until:
        time.sleep(min(1.0, BEAT_SECONDS / 4))
        now = _read(url)
        if now is None:
            return False
        if now != there:
            return True
    return False


def namespace() -> str:
    """The name of the set of processes that this one sees: containers have sets of their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return "pid"


def process(pid: int) -> str:
    """Return what tells a living process from a later one of the same number; "" if there is none."""
    try:
        stat = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
        return "" if stat[0] in "ZX" else f"{namespace()} {stat[19]}"
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        return f"{namespace()} {pid}"
    return f"{namespace()} {pid}"


def _read(url: str) -> dict[str, Any] | None:
    there = read_if_sound(url, ("owner", "host", "pid"), "it counts as nobody's")
    if there is not None and not (isinstance(there["pid"], int) and 0 < there["pid"] < 2**31):
        logger.warning("%s is damaged: its pid is %.40r; it counts as nobody's", url, there["pid"])
        return None
    return there


def _json(mine: dict[str, Any], beats: int) -> bytes:
    return (json.dumps(mine | {"beats": beats}, indent=2) + "\n").encode()
