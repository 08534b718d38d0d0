"""The beginning of a run in its directory, and its ends, each of which is a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimkd_ray import storage
from mimkd_ray.config import Config
from mimkd_ray.config.digest import changes, refuse_changes
from mimkd_ray.config.form.json_form import to_dict
from mimkd_ray.errors import MemberMemoryError, NonFiniteLossError, UserError
from mimkd_ray.json_files import read_if_sound, read_json
from mimkd_ray.teacher_cache.keys import CALIBRATIONS
from mimkd_ray.train.records import checkpoint
from mimkd_ray.train.records.loggers import FILE as LOGGERS
from mimkd_ray.train.records.run_dir import jsonable, write_json

CONFIG, RESULT, STOPPED, FAILED = "config.json", "result.json", "stopped.json", "failed.json"
_INPUTS = ("teacher.json", "labels.json", "student.json", LOGGERS)
"""What the run has been begun with, beside its config; the runs of loggers that were begun with it."""

DAMAGED_CONFIG = (
    "it says what is trained there: put it back from a copy, pass another --run.name, or remove it if the command is "
    "the same (checkpoints have it too)"
)
_ERRORS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (NonFiniteLossError, MemberMemoryError)}
"""Errors that end a member of a pack alone, by the name in failed.json."""


@dataclass(frozen=True)
class Finished:
    """The run came to its end."""

    result: dict[str, Any]
    """The contents of result.json."""


@dataclass(frozen=True)
class Failed:
    """A member of a pack could not go on; the others did."""

    error: Exception


@dataclass(frozen=True)
class Stopped:
    """The judge of a pack stopped a member."""

    epoch: int


Outcome = Finished | Failed | Stopped


def begin(config: Config, run_dir: str) -> dict[str, Any] | None:
    """Claim a run directory, and return the result of a run that has finished there. For the first worker alone."""
    finished = find_result(config, run_dir)
    claim(config, run_dir)
    return finished


def find_result(config: Config, run_dir: str) -> dict[str, Any] | None:
    """Return the result of a run that has finished in a directory; None if none has. Raises UserError for a directory
    that was begun with another training configuration, and for a limit of steps that the run has passed."""
    known_config(config, run_dir)
    found = _result(run_dir)
    limit = config.train.max_steps
    steps = found.get("steps", 0) if found is not None else (limit and checkpoint.newest_step(run_dir)) or 0
    if limit and limit < steps:
        raise UserError(
            f"train.max_steps is {limit}, and the run has trained {steps} steps: the limit may grow, and not shrink; "
            "pass another --run.name"
        )
    return None if found is not None and _is_longer(config, found) else found


def _is_longer(config: Config, result: Mapping[str, Any]) -> bool:
    """Return whether the run is to go on past the result: its limit of steps or its epochs have grown."""
    epochs, limit, steps = config.train.epochs, config.train.max_steps, result.get("steps", 0)
    return bool(steps and (not limit or limit > steps) and result.get("epochs", epochs) < epochs)


def _result(run_dir: str) -> dict[str, Any] | None:
    """The result of a run; None if there is none, or a damaged one, which a run from the last checkpoint makes anew."""
    return read_if_sound(
        storage.join(run_dir, RESULT), {"student": dict}, "the run goes on from its last checkpoint, and writes it anew"
    )


def claim(config: Config, run_dir: str) -> None:
    """Write config.json, unless it is there as it should be. Raises UserError for a directory that was begun with
    another training configuration."""
    value = jsonable(to_dict(config))
    known = known_config(config, run_dir)
    if known is None and not has_trained(run_dir):
        for name in _INPUTS:  # of another config
            storage.remove_file(storage.join(run_dir, name))
    if known != value:
        write_json(storage.join(run_dir, CONFIG), value)


def known_config(config: Config, run_dir: str) -> dict[str, Any] | None:
    """Return what config.json says; None if there is none. Raises UserError where what is trained differs."""
    old = read_json(storage.join(run_dir, CONFIG), {"data": dict, "train": dict}, DAMAGED_CONFIG)
    changed = changes(old, config) if old is not None else []
    if changed and not has_trained(run_dir):
        return None  # nothing there is of the old config: it may be replaced
    refuse_changes(run_dir, changed, extends=bool(config.run.name) and not config.compare.seeds)
    return old


def has_trained(run_dir: str) -> bool:
    """Return whether the directory has anything but what is written before the first step."""
    before = (CONFIG, *_INPUTS, "error.json", "stop.json", "ray.log", "lock.json")
    metrics = storage.join(run_dir, "metrics.jsonl")
    empty = ("metrics.jsonl", "samples.jsonl") if storage.exists(metrics) and not storage.size(metrics) else ()
    # A calibration has a key of its own, and serves every config that asks for the same.
    found = (name for name in storage.list_tree(run_dir) if not name.startswith(f"{CALIBRATIONS}/"))
    return any(name not in (*before, *empty) for name in found)


def read_outcome(run_dir: str) -> Outcome | None:
    """Return the end of the member of a pack with this directory; None if it goes on."""
    result = _result(run_dir)
    if result is not None:
        return Finished(result)
    stopped = read_json(storage.join(run_dir, STOPPED), {"epoch": int})
    if stopped is not None:
        return Stopped(stopped["epoch"])
    failed = read_json(storage.join(run_dir, FAILED), {"kind": str, "message": str})
    return None if failed is None else Failed(_ERRORS.get(failed["kind"], NonFiniteLossError)(failed["message"]))


def fail(run_dir: str, error: NonFiniteLossError | MemberMemoryError) -> Failed:
    """Write down what ended a member alone."""
    write_json(storage.join(run_dir, FAILED), {"kind": type(error).__name__, "message": str(error)})
    return Failed(error)
