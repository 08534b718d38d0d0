"""The reader of our own small JSON files: what is damaged is named, with what to do."""

from __future__ import annotations

import json
import logging
from typing import Any

from mimkd_ray import storage
from mimkd_ray.errors import DamagedDataError

logger = logging.getLogger(__name__)


def parse(data: bytes, url: str, keys: tuple[str, ...] = (), remedy: str = "") -> dict[str, Any]:
    """Return the JSON object in a file's bytes. Raises DamagedDataError where it is none, or lacks one of `keys`."""
    try:
        value = json.loads(data)
        problem = "" if isinstance(value, dict) else f"it holds a {type(value).__name__}"
    except (ValueError, RecursionError) as error:
        value, problem = {}, str(error)
    missing = [key for key in keys if not problem and key not in value]
    if missing:
        problem = f"it has no {missing[0]!r}"
    if problem:
        remedy = remedy or "put it back from a copy, or remove it"
        raise DamagedDataError(f"{url} ({len(data):,} bytes) is damaged: {problem}; {remedy}")
    return value


def read_json(url: str, keys: tuple[str, ...] = (), remedy: str = "") -> dict[str, Any] | None:
    """Return the JSON object in a file; None if there is no such file. Raises DamagedDataError as `parse` does."""
    try:
        return parse(storage.read_bytes(url), url, keys, remedy)
    except (FileNotFoundError, IsADirectoryError):
        return None


def read_if_sound(url: str, keys: tuple[str, ...] = (), instead: str = "") -> dict[str, Any] | None:
    """Return the JSON object in a file; None if there is none, or for a damaged one, of which one line is logged: it is
    done without, as `instead` says."""
    try:
        return read_json(url, keys, instead)
    except DamagedDataError as error:
        logger.warning("%s", error)
        return None
