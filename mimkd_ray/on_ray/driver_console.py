"""The console of a job under Ray: workers send lines and progress to the driver; what Ray itself says is in a file.

Ray's own way, which prints workers' output on the driver, cannot tell our lines from Ray's, and knows no bar.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mimkd_ray import console, local_files, storage
from mimkd_ray.on_ray.nodes.cluster import connect
from mimkd_ray.on_ray.nodes.cluster_address import cluster_address

LOG = "ray.log"
"""File in the directory that a job writes with what Ray and its workers print."""

POLL_SECONDS = 0.5


@ray.remote(num_cpus=0, max_restarts=-1)
class Mailbox:
    """Keeps what workers say until the driver takes it."""

    def __init__(self) -> None:
        self._waiting: list[Any] = []

    def put(self, item: Any) -> None:
        """Keep a line (text), or the work that goes on."""
        self._waiting.append(item)

    def take(self) -> list[Any]:
        """Hand out what has come since the last time."""
        taken, self._waiting = self._waiting, []
        return taken


class ToDriver:
    """The console of the first worker."""

    def __init__(self, mailbox: Any, every: float) -> None:
        self.mailbox, self.every = mailbox, every

    def line(self, text: str) -> None:
        """Send a line, without waiting."""
        self.mailbox.put.remote(text)

    def status(self, status: console.Status | None) -> None:
        """Send the work that goes on, without waiting."""
        self.mailbox.put.remote(status)


class _Warnings(logging.Handler):
    """Hands the package's warnings to the console: standard error is a file."""

    def emit(self, record: logging.LogRecord) -> None:
        console.line(self.format(record))


def speak_through(mailbox: Any, every: float, rank: int) -> None:
    """Make the first worker's lines and warnings appear on the driver; the others say nothing there."""
    own = logging.getLogger("mimkd_ray")
    own.handlers[:] = [each for each in own.handlers if not isinstance(each, _Warnings)]
    console.use(ToDriver(mailbox, every) if rank == 0 else console.Nobody())
    if rank == 0:
        own.addHandler(_Warnings(logging.WARNING))


def _tell(item: str | console.Status | None) -> None:
    if not isinstance(item, str):
        console.show(item)
    elif item not in console.told:
        console.line(item)


@contextlib.contextmanager
def heard(hear: Callable[[Any], None] = _tell) -> Iterator[Any]:
    """Yield a mailbox for workers, whose content this process hears during the with-block: by default its console tells
    it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    mailbox = Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    over = threading.Event()

    def listen() -> None:
        last = False
        while not last:
            last = over.wait(POLL_SECONDS)
            with contextlib.suppress(RayError):  # its node is gone: what comes next is heard from the new one
                for item in ray.get(mailbox.take.remote(), timeout=5):
                    hear(item)

    thread = threading.Thread(target=listen, name="workers' lines", daemon=True)
    thread.start()
    try:
        yield mailbox
    finally:
        over.set()
        thread.join(15)


@contextlib.contextmanager
def joined(address: str, flag: str, folder: str, verbose: bool, **options: Any) -> Iterator[bool]:
    """A with-block that is connected to Ray (see :func:`connect`), whose lines go to a file in ``folder``. Yields
    whether it was started here; then it ends with the block."""
    with ray_in_file(folder, verbose):
        with console.phase("joining the Ray cluster" if cluster_address(address) else "starting Ray"):
            own = connect(address, flag, **options)
        try:
            yield own
        finally:
            if own:
                with console.phase("ending Ray", said=False):
                    ray.shutdown()


@contextlib.contextmanager
def ray_in_file(folder_url: str, verbose: bool) -> Iterator[None]:
    """A with-block in which all that this process prints, Ray's C++ threads and forwarded lines of workers too, goes to
    ray.log in the folder, or nowhere without one; only the console still reaches people. ``verbose``: nothing of
    this."""
    if verbose:
        yield
        return
    remote = storage.is_remote(folder_url)
    with local_files.scratch("log") as scratch:
        folder = Path(scratch) if remote or not folder_url else storage.local_path(folder_url)
        path = folder / LOG
        with contextlib.ExitStack() as stack:
            if remote:
                stack.callback(_send, path, storage.join(folder_url, LOG))
            with storage.explained(str(path), "write"):
                folder.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context(path.open("a", buffering=1))
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            shown = console.Shown(_copy(sys.stdout, stack), _copy(sys.stderr, stack))
            stack.callback(console.use, console.use(shown))
            own, warnings = logging.getLogger("mimkd_ray"), _Warnings(logging.WARNING)
            own.addHandler(warnings)
            stack.callback(own.removeHandler, warnings)
            for number in (1, 2):
                saved = os.dup(number)
                stack.callback(os.close, saved)
                stack.callback(os.dup2, saved, number)
                os.dup2(log.fileno(), number)
            stack.enter_context(contextlib.redirect_stdout(log))
            stack.enter_context(contextlib.redirect_stderr(log))
            yield


def _send(path: Path, url: str) -> None:
    """Upload the log, of a job that has ended or failed: that is told whatever becomes of its log."""
    try:
        with storage.hurried():
            storage.upload(path, url)
    except Exception as error:
        console.line(f"what Ray printed is not kept: {error}")


def _copy(stream: Any, stack: contextlib.ExitStack) -> Any:
    """The stream on a descriptor of its own; a stream that has none, of a test or a notebook, as it is."""
    try:
        number = stream.fileno()
    except (AttributeError, io.UnsupportedOperation):
        return stream
    return stack.enter_context(os.fdopen(os.dup(number), "w", encoding=stream.encoding, errors="replace"))
