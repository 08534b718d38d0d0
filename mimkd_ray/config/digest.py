"""The fields that decide what is trained: their digest, and what differs between two configs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mimkd_ray.config.config import Config
from mimkd_ray.config.json_form import to_dict
from mimkd_ray.errors import UserError
from mimkd_ray.secret_urls import redacted_values

_SECTIONS_NOT_IN_DIGEST = ("recipe", "run", "launch")

_NOT_IN_DIGEST = {
    "train": ("log_every", "eval_every", "eval_batch", "information_rows", "engine"),
    "loss": ("score_memory_mb",),
    "data": ("loader_workers", "read_ahead", "store", "store_gb", "resident"),
    "cache": ("shard_rows", "batch", "workers", "canary", "tolerance"),
}
"""What may change between two starts of the same run: where it writes, who runs it, how often it looks."""


def training_part(value: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config's JSON form, the fields that decide what is trained."""
    return {
        section: {
            name: redacted_values(item) for name, item in fields.items() if name not in _NOT_IN_DIGEST.get(section, ())
        }
        for section, fields in value.items()
        if section not in _SECTIONS_NOT_IN_DIGEST
    }


def training_dict(config: Config) -> dict[str, Any]:
    """The fields that decide what is trained, in JSON form."""
    return training_part(to_dict(config))


def digest(config: Config) -> str:
    """Hex digest of the fields that decide what is trained."""
    text = json.dumps(training_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of differing fields with both values: "train.lanes: 2 -> 4"."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found


def refuse_changes(run_dir: str, changed: list[str]) -> None:
    """Raise UserError if anything in ``changed`` (as from :func:`differences`) differs from how the run was begun."""
    if changed:
        raise UserError(
            f"{run_dir} was begun with another configuration ({'; '.join(changed)}): pass the old values, "
            "another --run.name, or --run.overwrite true to start anew"
        )
