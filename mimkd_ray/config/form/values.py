"""The values of fields, checked against their annotations: the right type, finite, not absurdly large."""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mimkd_ray.errors import UserError
from mimkd_ray.seeds import SEEDS, check_seed

LARGEST = 10**9
"""Of any number but a seed: what is larger is a slip, and arithmetic with it overflows."""

FROM_0, FROM_1 = (0, LARGEST), (1, LARGEST)
"""Limits of a field."""

_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def check_values(section: Any, name: str = "", **limits: tuple[float, float]) -> None:
    """Raise UserError for a field whose value is of another type than it says, not finite, or out of its limits.

    ``name`` is the section's, before its fields in messages; without one they are called by their flags. ``limits``
    are the least and the most of single fields.
    """
    kind: Any = type(section)
    for field, annotation in _annotations(kind).items():
        value = getattr(section, field)
        shown = f"{name}.{field}" if name else f"--{field.replace('_', '-')}"
        if not fits(value, annotation):
            raise UserError(f"{shown} is {_shown(value)}: give {_described(annotation)}")
        if field == "seed" or (field.endswith("_seed") and value != -1):
            check_seed(shown, value)
            continue
        least, most = limits.get(field, (-LARGEST, LARGEST))
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not least <= number <= most:
                limit = f"{most:,} at most" if number > most else f"{least:,} or more"
                wanted = limit if isinstance(number, int) or math.isfinite(number) else "a finite number"
                raise UserError(f"{shown} is {_shown(number)}: give {wanted}")


def check_json(value: Mapping[str, Any], kind: Any, name: str = "") -> None:
    """Raise UserError for a field in the JSON form of a config that is of another type than the config says."""
    prefix = f"{name}." if name else ""
    for key in value:
        if not isinstance(key, str):  # YAML has such
            raise UserError(f"{prefix}{_shown(key)} is no name of a field: names are text")
    for field, annotation in _annotations(kind).items():
        given = value.get(field, dataclasses.MISSING)
        if given is dataclasses.MISSING:
            continue
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            if not isinstance(given, Mapping):
                raise UserError(f"{prefix}{field} is {_shown(given)}: give an object with the section's fields")
            check_json(given, annotation, f"{prefix}{field}")
        elif not fits(tuple(given) if isinstance(given, list) else given, annotation):
            raise UserError(f"{prefix}{field} is {_shown(given)}: give {_described(annotation)}")


def fits(value: Any, annotation: Any) -> bool:
    """Return whether a value is of an annotation's type: no truth value is a number, and no number is rounded."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return len(kinds) == len(value) and all(map(fits, value, kinds))
    if annotation in (int, float):
        return isinstance(value, int if annotation is int else int | float) and not isinstance(value, bool)
    return isinstance(value, annotation) if isinstance(annotation, type) else True


def worker_range(name: str, value: int | str) -> tuple[int, int]:
    """Return the fewest and the most of a field that is a number or a range such as 2..8; 0 alone leaves the choice to
    the launcher. Raises UserError for anything else."""
    parts = str(value).split("..")
    if len(parts) <= 2 and all(part.strip().isdecimal() for part in parts):
        fewest, most = int(parts[0]), int(parts[-1])
        if 0 < fewest <= most or fewest == most == 0:
            return fewest, most
    raise UserError(f"{name} is {value!r}: give a number, or a range such as 2..8")


@functools.cache
def _annotations(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _described(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_described, inner))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}" if len(inner) > 1 else repr(inner[0])
    if origin is tuple:
        return f"a list, each of them {_described(inner[0])}" + (
            "" if inner[-1] is Ellipsis else f", {len(inner)} in all"
        )
    return _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _shown(value: Any) -> str:
    plain = type(value) is int and abs(value) < SEEDS
    show = str if isinstance(value, int | float) else repr if isinstance(value, str) else reprlib.repr
    text = f"{value:,}" if plain else show(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
