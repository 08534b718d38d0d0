"""Conversion of a config to JSON and back: unknown names and wrong types are errors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

import cattrs
import cattrs.strategies
from cattrs.gen import make_dict_structure_fn

from mimkd_ray.config.form.values import check_json
from mimkd_ray.errors import UserError

T = TypeVar("T")

_converter = cattrs.Converter(forbid_extra_keys=True)

cattrs.strategies.configure_union_passthrough(int | float | str | None, _converter)

_converter.register_structure_hook_factory(
    dataclasses.is_dataclass,
    lambda cls: make_dict_structure_fn(cls, _converter, _cattrs_forbid_extra_keys=True),
)


def to_dict(config: Any) -> dict[str, Any]:
    """Return the plain JSON form of a config."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type[T], value: Mapping[str, Any]) -> T:
    """Build a config from its JSON form; an unknown name or a wrong type is a :class:`UserError`.

    A config of release 0.1 keeps its meaning.
    """
    if not isinstance(value, Mapping):
        raise UserError(f"a config is a JSON object of its sections, and this is a {type(value).__name__}")
    check_json(value, kind)  # cattrs rounds 1.5 to 1, and takes true for 1
    value = _of_this_release(value)
    try:
        return _converter.structure(value, kind)
    except cattrs.BaseValidationError as error:
        user_errors = [e for e in _leaves(error) if isinstance(e, UserError)]
        if user_errors:
            raise user_errors[0] from None
        raise UserError("; ".join(cattrs.transform_error(error, path="config"))) from None


_CRITIC_OF_0_1 = {"kind", "width", "temperature", "learn_temperature", "min_temperature"}
"""All fields of the critic in a file that release 0.1 wrote; what is written by hand names a few."""


def _of_this_release(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config with the names of this release. The preset `accuracy` of release 0.1 is now `two_sided`."""
    loss = value.get("loss", {})
    critic = loss.get("critic", {}).keys()
    if loss.get("preset") == "accuracy" and critic >= _CRITIC_OF_0_1 and "teacher" not in critic:
        return {**value, "loss": {**loss, "preset": "two_sided"}}
    return value


def _leaves(error: BaseException) -> list[BaseException]:
    inner = getattr(error, "exceptions", None)
    return [leaf for child in inner for leaf in _leaves(child)] if inner else [error]


def dotted(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the items of nested mappings by their dotted names."""
    found = []
    for name, item in value.items():
        found += dotted(item, f"{prefix}{name}.") if isinstance(item, Mapping) else [(prefix + name, item)]
    return found
