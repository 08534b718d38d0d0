"""The beginning of a run in its directory, and its ends, each of which is a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mimkd_ray import storage
from mimkd_ray.config import Config
from mimkd_ray.config.digest import differences, refuse_changes, training_dict, training_part
from mimkd_ray.config.json_form import to_dict
from mimkd_ray.errors import MemberMemoryError, NonFiniteLossError
from mimkd_ray.json_files import read_if_sound, read_json
from mimkd_ray.train.records.run_dir import jsonable, write_json

CONFIG, RESULT, STOPPED, FAILED = "config.json", "result.json", "stopped.json", "failed.json"

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
    that was begun with another training configuration."""
    known_config(config, run_dir)
    return _result(run_dir)


def _result(run_dir: str) -> dict[str, Any] | None:
    """The result of a run; None if there is none, or a damaged one, which a run from the last checkpoint makes anew."""
    return read_if_sound(
        storage.join(run_dir, RESULT), ("student",), "the run goes on from its last checkpoint, and writes it anew"
    )


def claim(config: Config, run_dir: str) -> None:
    """Write config.json, unless it is there as it should be. Raises UserError for a directory that was begun with
    another training configuration."""
    value = jsonable(to_dict(config))
    if known_config(config, run_dir) != value:
        write_json(storage.join(run_dir, CONFIG), value)


def known_config(config: Config, run_dir: str) -> dict[str, Any] | None:
    """Return what config.json says; None if there is none. Raises UserError where what is trained differs."""
    old = read_json(storage.join(run_dir, CONFIG), ("data", "train"), DAMAGED_CONFIG)
    if old is not None:
        refuse_changes(run_dir, differences(training_part(old), training_dict(config)))
    return old


def read_outcome(run_dir: str) -> Outcome | None:
    """Return the end of the member of a pack with this directory; None if it goes on."""
    result = _result(run_dir)
    if result is not None:
        return Finished(result)
    stopped = read_json(storage.join(run_dir, STOPPED), ("epoch",))
    if stopped is not None:
        return Stopped(stopped["epoch"])
    failed = read_json(storage.join(run_dir, FAILED), ("kind", "message"))
    return None if failed is None else Failed(_ERRORS.get(failed["kind"], NonFiniteLossError)(failed["message"]))


def fail(run_dir: str, error: NonFiniteLossError | MemberMemoryError) -> Failed:
    """Write down what ended a member alone."""
    write_json(storage.join(run_dir, FAILED), {"kind": type(error).__name__, "message": str(error)})
    return Failed(error)
