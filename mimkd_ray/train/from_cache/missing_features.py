"""Messages for a cache that does not hold what a run needs: what differs, and how to build the right one."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from mimkd_ray.config import Config
from mimkd_ray.teacher_cache.feature_manifest import views_there
from mimkd_ray.teacher_cache.keys import difference, key_of, nearest_key, read_keys
from mimkd_ray.teacher_cache.pixel_digests import PIXELS


class Wanted(NamedTuple):
    """An entry that a run needs, and the views of it that are not there."""

    label: str
    parts: dict[str, Any]
    missing: list[int]


def explain(configs: Sequence[Config], lacking: Sequence[Wanted]) -> str:
    """The message for entries that lack views, of one run or of those of a pack; "" for none. Reads every key below
    the root."""
    if not lacking:
        return ""
    root = configs[0].cache.root
    bad: list[str] = []
    keys = read_keys(root, bad)
    there = {key: views_there(root, key) for key in keys}
    # An entry whose building has not come to a manifest is no cache.
    finished = {key: parts for key, parts in keys.items() if there[key]}
    said: dict[str, list[str]] = {}
    for wanted in lacking:
        said.setdefault(_reason(wanted, finished, there), []).append(wanted.label)
    reasons = "; ".join(f"{', '.join(labels)}: {reason}" for reason, labels in said.items())
    commands = " && ".join(dict.fromkeys(build_command(config) for config in configs))
    reasons += "".join(f"; {problem}" for problem in bad[:3])
    seeds = set.intersection(*(_other_view_seeds(wanted, finished, there) for wanted in lacking))
    if seeds:
        reasons = f"pass --data.view-seed {min(seeds)}, which reads the one that is there; {reasons}"
    return f"the cache {root} does not fit this run: {reasons}. Build what is missing with: {commands}"


def _other_view_seeds(wanted: Wanted, finished: dict[str, Any], there: dict[str, set[int]]) -> set[int]:
    """The seeds of views with which the entry is there as it is wanted."""
    return {
        parts["view_seed"]
        for key, parts in finished.items()
        if (parts.get("tap"), parts.get("kind")) == (wanted.parts["tap"], wanted.parts["kind"])
        and there[key] >= set(wanted.missing)
        and parts["view_seed"] != wanted.parts["view_seed"]
        and len(difference(wanted.parts, parts)) == 1
    }


def _reason(wanted: Wanted, finished: dict[str, Any], there: dict[str, set[int]]) -> str:
    own = key_of(wanted.parts)
    if own in finished:
        views = ", ".join(map(str, wanted.missing[:8])) + (", ..." if len(wanted.missing) > 8 else "")
        said = f"views {views} are missing" if len(wanted.missing) > 1 else f"view {views} is missing"
        return f"{said}, {len(there[own])} are there (--data.views)"
    if not finished:
        return "nothing is cached there yet"
    nearest = nearest_key(wanted.parts, finished)
    if nearest is None:
        taps = {(parts["tap"], parts["kind"]) for parts in finished.values()} - {(PIXELS, PIXELS)}
        named = [tap if tap == kind else f"{tap} ({kind})" for tap, kind in sorted(taps)]
        return f"this tap is not cached; there are {', '.join(named)}"
    return f"the nearest one there has another {'; another '.join(difference(wanted.parts, finished[nearest]))}"


_OF_FEATURES = {
    "data": (
        *("root", "train_split", "val_split", "holdout", "subset", "split_seed", "subset_seed", "num_classes"),
        *("image_column", "label_column", "labels", "max_damaged", "max_pixels"),
        *("pipeline", "image_size", "mean", "std", "views", "view_seed", "exif"),
    ),
    "teacher": ("name", "weights", "classes", "input", "image_size", "mean", "std", "interpolation"),
    "student": ("name",),
    "cache": ("root", "codecs", "logits", "taps", "precision", "calibration_rows"),
    "loss": (
        *("name", "preset", "rival_pairs", "global_pairs", "local_pairs", "feature_pairs", "taps", "max_side"),
        *("global_weight", "local_weight", "feature_weight", "kd_weight"),
    ),
    "train": ("seed", "precision"),
}
"""Of a config, the fields that decide what is cached."""


def build_command(config: Config) -> str:
    """The command line that builds what a run of ``config`` reads."""
    default = Config()
    flags = []
    for section, names in _OF_FEATURES.items():
        own, plain = getattr(config, section), getattr(default, section)
        for field in dataclasses.fields(own):
            value = getattr(own, field.name)
            if field.name in names and value != getattr(plain, field.name):
                flag = f"--{section}.{field.name}".replace("_", "-")
                flags += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(["python", "jobs/cache_teacher.py", "custom", *flags])
