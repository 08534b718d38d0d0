"""Checkpoints: checkpoints/step_XXXXXXXX-ATTEMPT/state.pt; one counts once its digest marker, written last, is there.

Rank 0 writes them, in a thread: training waits only while the state is copied to memory of its own. A save waits for
the one before it, so at most one is on its way.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mimkd_ray import storage
from mimkd_ray.errors import DamagedDataError
from mimkd_ray.json_files import parse as parse_json
from mimkd_ray.train.records.rescue import rescued

logger = logging.getLogger(__name__)

MARKER = "committed.json"
STATE = "state.pt"
FOLDER = "checkpoints"
DAMAGED = "damaged_"
"""In front of the name of a checkpoint that was put aside."""


class Writer:
    """Commits the states of one run, one after the other.

    Memory: one copy of the state, kept for the next save (fresh memory takes several times as long to fill), and while
    it is written its serialised form.
    """

    def __init__(self, run_dir: str, keep: int, before: Callable[[str], None]) -> None:
        """``before`` is called ahead of each commit, in the thread, with the folder that it goes to: what belongs to
        the state must not be missing."""
        self.run_dir, self.keep, self.before = run_dir, keep, before
        self.stalls: list[float] = []  # seconds that training waited, by save
        self._copied: Any = None  # of the last save, for the next one
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy ``state`` and commit it in the background. Raises what the save before ran into.

        Where the run's directory, in a store, stays away, the state is saved on this machine, and the error says so.
        """
        began = time.perf_counter()
        self.wait()
        copied = self._copied = _copy(state, self._copied)
        self.stalls.append(time.perf_counter() - began)

        def commit(folder: str) -> None:
            self.before(folder)
            save(folder, step, copied, self.keep)

        self.start(f"checkpoint {step}", commit)

    def start(self, name: str, write: Callable[[str], None]) -> None:
        """Call ``write`` in the background with the run's directory, and where that, in a store, stays away, with a
        folder of this machine."""

        def run() -> None:
            try:
                try:
                    write(self.run_dir)
                except (storage.StorageError, storage.AccessError) as error:
                    raise rescued(self.run_dir, write, error) from error
            except BaseException as error:  # handed to the training thread, which raises it
                self._error = error

        self._thread = threading.Thread(target=run, name=name)
        self._thread.start()

    def busy(self, seconds: float) -> bool:
        """Wait so long, and return whether anything is still to be committed. Raises what went wrong on the way."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return True
        self.wait()
        return False

    def wait(self) -> None:
        """Return when everything is committed. Raises what went wrong on the way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def _copy(value: Any, earlier: Any) -> Any:
    """The same structure with tensors copied to the CPU: training changes the originals in place meanwhile.

    ``earlier`` is the copy before this one, whose tensors are used again where they fit.
    """
    if isinstance(value, Tensor):
        if isinstance(earlier, Tensor) and (earlier.shape, earlier.dtype) == (value.shape, value.dtype):
            return earlier.copy_(value.detach())
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        old = earlier if isinstance(earlier, dict) else {}
        return {key: _copy(item, old.get(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        old_items = earlier if isinstance(earlier, list | tuple) and len(earlier) == len(value) else [None] * len(value)
        return type(value)(_copy(item, old) for item, old in zip(value, old_items, strict=True))
    return value


def save(run_dir: str, step: int, state: dict[str, Any], keep: int) -> str:
    """Commit a checkpoint and prune all but the newest ``keep``. Returns its URL. Called by rank 0 only."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    # A name of its own: a worker that was given up for lost may still be writing the same step.
    folder = storage.join(run_dir, FOLDER, f"step_{step:08d}-{os.urandom(3).hex()}")
    storage.write_bytes(storage.join(folder, STATE), data)
    marker = {"step": step, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    storage.write_bytes(storage.join(folder, MARKER), json.dumps(marker).encode())
    _prune(run_dir, keep)
    return folder


def newest(run_dir: str) -> tuple[str, bytes] | None:
    """URL and content of the newest committed and undamaged checkpoint of the run, or None."""
    for folder in reversed(_folders(run_dir)):
        data = _sound(folder)
        if data is not None:
            return folder, data
    return None


def newest_step(run_dir: str) -> int | None:
    """The step of the newest committed checkpoint of the run, or None. Reads no content."""
    there = (folder for folder in reversed(_folders(run_dir)) if storage.exists(storage.join(folder, MARKER)))
    return next(map(_step, there), None)


def newest_shared(run_dirs: Sequence[str]) -> tuple[int, list[bytes]]:
    """The newest step at which each of these runs has a committed and undamaged checkpoint, and their contents.

    Without one: step 0 and no content. Holds as many checkpoints in memory as there are runs.
    """
    by_step: list[dict[int, list[str]]] = []
    for run_dir in run_dirs:
        own: dict[int, list[str]] = {}
        for folder in reversed(_folders(run_dir)):
            own.setdefault(_step(folder), []).append(folder)
        by_step.append(own)
    for step in sorted(set(by_step[0]).intersection(*by_step), reverse=True):
        contents = []
        for own in by_step:
            data = next((data for data in map(_sound, own[step]) if data is not None), None)
            if data is None:
                break
            contents.append(data)
        else:
            return step, contents
    return 0, []


def drop_after(run_dir: str, step: int) -> None:
    """Remove the checkpoints of later steps than ``step``: a run that goes on from there makes them again. Of one that
    begins at step 0 those that are damaged are put aside, as all that was trained may be in them."""
    for folder in _folders(run_dir):
        if _step(folder) > step:
            if step == 0:
                _put_aside_if_damaged(folder)
            storage.remove_tree(folder)


def _put_aside_if_damaged(folder: str) -> None:
    try:
        read(folder)
    except FileNotFoundError:
        return  # never committed, or nothing of it is left
    except DamagedDataError:
        parent, _, name = folder.rpartition("/")
        aside = storage.join(parent, DAMAGED + name)
        for file in storage.list_files(folder):
            storage.write_bytes(storage.join(aside, file.rpartition("/")[2]), storage.read_bytes(file))
        logger.warning("%s is damaged, and training begins at step 0: it is kept as %s", folder, aside)


def _sound(folder: str) -> bytes | None:
    """The content of a checkpoint's folder; None if it is none, or damaged."""
    if not storage.exists(storage.join(folder, MARKER)):
        return None  # a kill came before the marker: it was never one
    try:
        return read(folder)
    except (DamagedDataError, FileNotFoundError) as error:
        logger.warning("%s; trying an older one", error)
        return None


def parse(data: bytes, device: torch.device) -> dict[str, Any]:
    """The state in a checkpoint's content. Tensors only: ``weights_only`` refuses pickled code."""
    return torch.load(io.BytesIO(data), map_location=device, weights_only=True)


def student_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the student in a checkpoint's state that a run exports: the moving average where there is one."""
    average = state["ema"] is not None
    tensors, prefix = (state["ema"], "module.model.") if average else (state["distiller"], "student.model.")
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def read(folder: str) -> bytes:
    """The content of a committed checkpoint. Raises DamagedDataError if it does not match its digest."""
    url = storage.join(folder, MARKER)
    marker = parse_json(storage.read_bytes(url), url, ("sha256",))
    data = storage.read_bytes(storage.join(folder, STATE))
    if hashlib.sha256(data).hexdigest() != marker["sha256"]:
        raise DamagedDataError(f"checkpoint {folder} ({len(data):,} bytes) does not match its digest; remove it")
    return data


def _folders(run_dir: str) -> list[str]:
    """All checkpoint folders of the run, committed or not, by step."""
    found = storage.list_dirs(storage.join(run_dir, FOLDER))
    return sorted(url for url in found if url.rpartition("/")[2].startswith("step_"))


def _step(folder: str) -> int:
    """The step in a folder's name."""
    return int(folder.rpartition("/step_")[2].partition("-")[0])


def _prune(run_dir: str, keep: int) -> None:
    """Remove what is older than the newest ``keep`` committed checkpoints."""
    kept = 0
    for folder in reversed(_folders(run_dir)):
        if kept >= keep:
            storage.remove_tree(folder)
        elif storage.exists(storage.join(folder, MARKER)):
            kept += 1
