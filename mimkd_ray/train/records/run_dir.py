"""A run directory: config.json, metrics.jsonl, tensorboard/, checkpoints/, result.json, student.safetensors; where it
is asked for, best.safetensors and best.json; of a pack's member that did not finish, stopped.json or failed.json.

The directory may be local or any fsspec URL. Object stores cannot append, so files that grow are kept in a local
staging folder and published as a whole after each evaluation; a local directory is its own staging folder.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from mimkd_ray import local_files, storage
from mimkd_ray.config import RunConfig
from mimkd_ray.errors import UserError
from mimkd_ray.train.records.loggers import Loggers


def jsonable(value: Any) -> Any:
    """``value`` with NaN and infinities as None: strict JSON, which other tools read."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value


def write_json(url: str, value: Any) -> None:
    """Publish ``value`` as indented strict JSON."""
    storage.write_bytes(url, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """``value`` as indented strict JSON."""
    return (json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n").encode()


def read_metrics(run_dir: str, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in the run's metrics.jsonl; none if there is no such file."""
    mark = f'"kind": "{kind}"'.encode()
    lines = _lines(storage.join(run_dir, "metrics.jsonl"), lambda line: mark in line)
    return [values for _, values in lines if values.get("kind") == kind]


def _lines(url: str, wanted: Callable[[bytes], bool] = bool) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a file, as they stand and as they are read: one at a time, as there may be millions.

    What is no line of ours is passed over: a kill or a full disk cuts one short, and disks damage others.
    """
    if not storage.exists(url):
        return
    with io.BufferedReader(storage.open_file(url), 1 << 20) as file:  # type: ignore[type-var]
        for line in file:
            if not wanted(line):
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(values, dict) and isinstance(values.get("step"), int):
                yield line.rstrip(b"\n") + b"\n", values


class MetricsLog:
    """metrics.jsonl, samples.jsonl, TensorBoard and other loggers of one run. Only rank 0 makes one.

    Lines from after the step that training resumes from are dropped: they will be written again.
    """

    def __init__(self, run_dir: str, start_step: int, config: RunConfig) -> None:
        self.run_dir = run_dir
        self.remote = storage.is_remote(run_dir)
        self.staging = Path(local_files.scratch_folder("run") if self.remote else run_dir)
        self.staging.mkdir(parents=True, exist_ok=True)
        self._start_step = start_step
        self._lines = self._continue("metrics.jsonl")
        self._samples = self._continue("samples.jsonl") if config.log_samples else None
        self._tensorboard: Any = None
        self._wants_tensorboard = config.tensorboard
        self._loggers = Loggers(run_dir, config.loggers)

    def _continue(self, name: str) -> BinaryIO:
        """Open a file of lines for appending, without those from after the start. Not buffered: what is written stays
        when this process is killed, and nothing is left to be written when the disk is full."""
        old = _lines(storage.join(self.run_dir, name))
        path = self.staging / name
        with storage.explained(str(path), "write"):
            kept = (line for line, values in old if values["step"] <= self._start_step)
            local_files.publish(path, lambda out: out.writelines(kept))
        return path.open("ab", buffering=0)

    def _append(self, file: BinaryIO, *lines: Mapping[str, Any]) -> None:
        left = "".join(json.dumps(jsonable(line), allow_nan=False) + "\n" for line in lines).encode()
        with storage.explained(self.run_dir, "write to"):
            while left:
                left = left[file.write(left) :]

    def write_samples(self, step: int, view: int, ids_LB: Tensor) -> None:
        """Add a line {"step", "lane", "view", "ids"} for each lane: what step number ``step`` (from 1) trained on."""
        assert self._samples is not None
        lanes = enumerate(ids_LB.tolist())
        lines = [{"step": step, "lane": lane, "view": view, "ids": ids_B} for lane, ids_B in lanes]
        self._append(self._samples, *lines)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Add a line {"kind", "step", ...} and one point per number to TensorBoard and the loggers."""
        self._append(self._lines, {"kind": kind, "step": step, **values})
        points = {f"{kind}/{key}": v for key, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        self._loggers.write(points, step)
        if not self._wants_tensorboard:
            return
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter  # half a second: only once there is a point

            self._tensorboard = SummaryWriter(
                str(self.staging / "tensorboard"),
                purge_step=self._start_step + 1 if self._start_step else None,
            )
        with storage.explained(self.run_dir, "write to"):  # its thread's errors
            for key, value in points.items():
                self._tensorboard.add_scalar(key, value, step)

    def publish(self, folder: str) -> None:
        """Bring the staged files of a remote run to ``folder``, its directory or one of this machine; flush local ones.
        Raises UserError if the run's directory is gone."""
        if folder == self.run_dir:
            self._check_place()
        elif not self.remote:  # they stay where they are
            return
        if self._tensorboard is not None:
            with storage.explained(self.run_dir, "write to"):
                self._tensorboard.flush()
        if self.remote:
            for path in self.staging.rglob("*"):
                if path.is_file():
                    storage.upload(path, storage.join(folder, path.relative_to(self.staging).as_posix()))

    def _check_place(self) -> None:
        """A directory that is moved or removed would be made again, with half of the files."""
        path, written = self.staging / "metrics.jsonl", os.fstat(self._lines.fileno())
        found = os.stat(path) if path.exists() else None
        if found is None or (found.st_ino, found.st_dev) != (written.st_ino, written.st_dev):
            raise UserError(
                f"{path} is gone, or another file: the directory of the run was moved, removed or begun anew while it "
                "was running; put it back and give the same command again"
            )

    def close(self) -> None:
        """Release the files, which are published."""
        self._lines.close()
        if self._samples is not None:
            self._samples.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._loggers.close()
        if self.remote:
            shutil.rmtree(self.staging, ignore_errors=True)
