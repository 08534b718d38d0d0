"""The fields that determine the training: their digest, and the differences between two configs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mimkd_ray.config.config import Config
from mimkd_ray.config.form.json_form import to_dict
from mimkd_ray.errors import UserError
from mimkd_ray.secret_urls import redacted_values

_SECTIONS_NOT_IN_DIGEST = ("recipe", "run", "launch", "storage")

_NOT_IN_DIGEST = {
    "train": ("log_every", "eval_every", "eval_batch", "information_rows", "engine"),
    "loss": ("score_memory_mb",),
    "teacher": ("expect_top1", "tolerance", "allow_chance"),
    "data": ("val_rows", "loader_workers", "read_ahead", "store", "store_gb", "resident"),
    "cache": ("shard_rows", "batch", "workers", "canary", "tolerance"),
}
"""Fields that may change between two starts of the same run: output places, machines, logging, checks, evaluation."""


def training_part(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that determine the training, from a config's JSON form. A field that a section lacks, as in a
    file from before there was such a field, has its default."""
    known = to_dict(Config())
    return {
        section: {
            name: redacted_values(item)
            for name, item in filled(fields, known.get(section, {})).items()
            if name not in _NOT_IN_DIGEST.get(section, ())
        }
        for section, fields in value.items()
        if section not in _SECTIONS_NOT_IN_DIGEST and isinstance(fields, Mapping)  # what is damaged differs
    }


def filled(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields, and the defaults of those that are missing."""
    return {**defaults} | {
        name: filled(item, defaults[name])
        if isinstance(item, Mapping) and isinstance(defaults.get(name), Mapping)
        else item
        for name, item in fields.items()
    }


def training_dict(config: Config) -> dict[str, Any]:
    """Return the fields that determine the training, in JSON form."""
    return training_part(to_dict(config))


def digest(config: Config) -> str:
    """Return the hex digest of the fields that determine the training. A field at its default does not count, so that
    a new field changes the digest, which names directories, of no config that does not use it."""
    return _digest(training_dict(config))


def _digest(part: Mapping[str, Any]) -> str:
    return digest_of(part, training_dict(Config()))


def digest_of(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Return the hex digest of the fields that are not at their defaults."""
    return hashlib.sha256(json.dumps(_unlike(fields, defaults), sort_keys=True).encode()).hexdigest()


def _unlike(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _unlike(item, defaults[name])
        if isinstance(item, Mapping) and isinstance(defaults.get(name), Mapping)
        else item
        for name, item in fields.items()
        if name not in defaults or item != defaults[name]
    }


def steps_may_grow(config: Config) -> bool:
    """Return whether `max_steps` decides nothing but the end: it limits a teacher that is trained first, too."""
    return not config.compare.seeds and not config.teacher.trains


def epochs_may_grow(config: Config) -> bool:
    """Return whether the number of epochs decides nothing but the end."""
    own_teacher = not config.teacher.trains or config.teacher.epochs > 0
    schedules = config.optim.schedule != "cosine" and config.loss.schedule == "constant"
    return not config.compare.seeds and own_teacher and schedules


def identity(config: Config) -> str:
    """Return the hex digest that names the run's directory: without the length, where that may grow."""
    part = training_dict(config)
    if steps_may_grow(config):
        del part["train"]["max_steps"]
    if epochs_may_grow(config):
        del part["train"]["epochs"]
    return _digest(part)


def changes(old: Mapping[str, Any], config: Config) -> list[str]:
    """Return how a run differs from its earlier config, or the training part of it, as :func:`differences`. The limit
    of steps may change, and epochs may become more, where the run stays the same."""
    part, new = training_part(old), training_dict(config)
    own = part.get("train", {})
    if steps_may_grow(config):
        own["max_steps"] = new["train"]["max_steps"]
    if epochs_may_grow(config) and own.get("epochs", 0) < new["train"]["epochs"]:
        own["epochs"] = new["train"]["epochs"]
    found = differences(part, new)
    if own.get("epochs") != new["train"]["epochs"]:
        found.append("a schedule over other epochs is another training from the first step on")
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted names of differing fields with both values, such as "train.lanes: 2 -> 4"."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found


def refuse_changes(run_dir: str, changed: list[str], extends: bool = False) -> None:
    """Raise UserError if ``changed`` (from :func:`differences`) names any field that differs from the run's first
    start. ``extends``: the run could be extended."""
    if changed:
        raise UserError(
            f"{run_dir} was begun with another configuration ({'; '.join(changed)}): pass the old values, "
            + ("--run.extend true to go on from its weights, " if extends else "")
            + "another --run.name, or --run.overwrite true to start anew"
        )
