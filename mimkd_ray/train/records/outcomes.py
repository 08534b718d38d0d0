"""The beginning of a run in its directory, and its ends, each of which is a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mimkd_ray import storage
from mimkd_ray.config import Config
from mimkd_ray.config.digest import differences, refuse_changes, training_dict, training_part
from mimkd_ray.config.json_form import to_dict
from mimkd_ray.errors import MemberMemoryError, NonFiniteLossError
from mimkd_ray.train.records.run_dir import jsonable, read_json, write_json

CONFIG, RESULT, STOPPED, FAILED = "config.json", "result.json", "stopped.json", "failed.json"

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
    found: dict[str, Any] | None = read_json(storage.join(run_dir, RESULT))
    return found


def claim(config: Config, run_dir: str) -> None:
    """Write config.json, unless it is there as it should be. Raises UserError for a directory that was begun with
    another training configuration."""
    value = jsonable(to_dict(config))
    if known_config(config, run_dir) != value:
        write_json(storage.join(run_dir, CONFIG), value)


def known_config(config: Config, run_dir: str) -> dict[str, Any] | None:
    """Return what config.json says; None if there is none. Raises UserError where what is trained differs."""
    old: dict[str, Any] | None = read_json(storage.join(run_dir, CONFIG))
    if old is not None:
        refuse_changes(run_dir, differences(training_part(old), training_dict(config)))
    return old


def read_outcome(run_dir: str) -> Outcome | None:
    """Return the end of the member of a pack with this directory; None if it goes on."""
    result = read_json(storage.join(run_dir, RESULT))
    if result is not None:
        return Finished(result)
    stopped = read_json(storage.join(run_dir, STOPPED))
    if stopped is not None:
        return Stopped(stopped["epoch"])
    failed = read_json(storage.join(run_dir, FAILED))
    return None if failed is None else Failed(_ERRORS[failed["kind"]](failed["message"]))


def fail(run_dir: str, error: NonFiniteLossError | MemberMemoryError) -> Failed:
    """Write down what ended a member alone."""
    write_json(storage.join(run_dir, FAILED), {"kind": type(error).__name__, "message": str(error)})
    return Failed(error)
