"""The reader of our own small JSON files: what is damaged is named, with what to do."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mimkd_ray import storage
from mimkd_ray.errors import DamagedDataError

logger = logging.getLogger(__name__)

Keys = Sequence[str] | Mapping[str, type | tuple[type, ...]]
"""What a file has to have: names, or the types of what has these names."""

NUMBER = (int, float)


def parse(data: bytes, url: str, keys: Keys = (), remedy: str = "") -> dict[str, Any]:
    """Return the JSON object in a file's bytes. Raises DamagedDataError where it is none, or lacks one of `keys` or has
    it of another type."""
    try:
        value = json.loads(data)
        problem = "" if isinstance(value, dict) else f"it holds a {type(value).__name__}"
    except (ValueError, RecursionError) as error:
        value, problem = {}, str(error)
    problem = problem or _lack(value, keys)
    if problem:
        remedy = remedy or "put it back from a copy, or remove it"
        raise DamagedDataError(f"{url} ({len(data):,} bytes) is damaged: {problem}; {remedy}")
    return value


def _lack(value: Mapping[str, Any], keys: Keys) -> str:
    kinds = keys if isinstance(keys, Mapping) else dict.fromkeys(keys, object)
    for key, kind in kinds.items():
        if key not in value:
            return f"it has no {key!r}"
        if not isinstance(value[key], kind):
            return f"its {key!r} is {value[key]!r:.40}"
    return ""


def read_json(url: str, keys: Keys = (), remedy: str = "") -> dict[str, Any] | None:
    """Return the JSON object in a file; None if there is no such file. Raises DamagedDataError as `parse` does."""
    try:
        return parse(storage.read_bytes(url), url, keys, remedy)
    except (FileNotFoundError, IsADirectoryError):
        return None


def read_if_sound(url: str, keys: Keys = (), instead: str = "") -> dict[str, Any] | None:
    """Return the JSON object in a file; None if there is none, or for a damaged one, of which one line is logged: it is
    done without, as `instead` says."""
    try:
        return read_json(url, keys, instead)
    except DamagedDataError as error:
        logger.warning("%s", error)
        return None
