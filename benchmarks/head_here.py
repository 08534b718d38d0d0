"""A Ray head on this machine, in separate processes, to which jobs are submitted as to a cluster.

It takes free ports (the dashboard's on 127.0.0.1 only), requires a token that only its clients get, and keeps its files
in a folder that is removed with it. Its processes are ended by their ids: `ray stop` would end every Ray of the
machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from children import tree

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
START_SECONDS = 120
PORTS = (
    *("--dashboard-port", "--dashboard-agent-listen-port", "--dashboard-agent-grpc-port", "--metrics-export-port"),
    "--ray-client-server-port",
)


@dataclass(frozen=True, kw_only=True)
class Head:
    """A running head."""

    url: str
    """URL of the dashboard, which accepts jobs."""
    folder: Path
    """Ray's files."""
    log: Path
    """Output of the head."""
    environment: Mapping[str, str]
    """Environment of its clients; RAY_AUTH_TOKEN_PATH is the token's file."""

    def command(self, *words: str) -> list[str]:
        """Return the command ``ray job ...`` for this head."""
        return [str(BIN / "ray"), "job", words[0], "--address", self.url, *words[1:]]

    def submit(self, name: str, *entrypoint: str, options: Sequence[str] = (), folder: Path = ROOT) -> list[str]:
        """Return ``ray job submit`` of a command that runs in a copy of a folder, the project's by default."""
        where = ("--submission-id", name, "--working-dir", str(folder), *options)
        return self.command("submit", *where, "--", *entrypoint)

    def ask(self, path: str) -> Any:
        """Return the dashboard's answer to a GET of ``path``."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = Request(self.url + path, headers={"Authorization": f"Bearer {token}"})
        with urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def job(self, name: str) -> dict[str, Any]:
        """Return the facts of a submitted job: status, driver_exit_code, message, start_time in ms, ..."""
        found: dict[str, Any] = self.ask(f"/api/jobs/{name}")
        return found

    def jobs(self) -> list[dict[str, Any]]:
        """Return the facts of all jobs."""
        found: list[dict[str, Any]] = self.ask("/api/jobs/")
        return found


@contextlib.contextmanager
def ray_head(*options: str, port: int = 0, **environment: str) -> Iterator[Head]:
    """Run ``ray start --head`` with these options and variables during a with-block; ``port`` is the cluster's, by
    default a free one."""
    # Not in a folder of the caller's: the name of a socket in it has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="ray-head-"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    ports = {"--port": port or free_port(), **{name: free_port() for name in PORTS}}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    inherited.pop("PYTHONPATH", None)  # jobs are to run what was submitted
    env = {
        **inherited,
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}",  # a job's `python` is this one
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        **environment,
    }
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--temp-dir", str(folder), "--node-ip-address", "127.0.0.1"),
        *("--dashboard-host", "127.0.0.1", "--min-worker-port", "0", "--max-worker-port", "0"),
        *(word for name, number in ports.items() for word in (name, str(number))),
        *options,
    ]
    log = folder / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    head = Head(
        url=f"http://127.0.0.1:{ports['--dashboard-port']}",
        folder=folder,
        log=log,
        environment=env,
    )
    try:
        _wait_for(head, process)
        yield head
    finally:
        for pid in tree(process.pid):  # if asked to end, it would take its twenty seconds
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """Return a port on which no process listens."""
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return int(each.getsockname()[1])


def _wait_for(head: Head, process: subprocess.Popen[bytes]) -> None:
    """Wait until the head accepts jobs."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            head.jobs()
            return
        except OSError as error:  # no process listens yet, or the job agent is not up
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the head did not come up ({error}):\n{head.log.read_text()}") from None
        time.sleep(0.2)
