"""Which columns of a Parquet file hold the images and the labels: by name, by the file's own metadata, or by type."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from mimkd_ray.config.data import MOST_CLASSES
from mimkd_ray.errors import UserError

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "image_bytes")
LABELS = ("label", "labels", "fine_label", "cls", "class", "class_label", "target", "targets", "category", "y")
NO_LABELS = ("id", "index", "idx", "__index_level_0__", "image_id", "width", "height", "size")
"""Integers that are no class numbers, though there may be no other integers."""
NUMBERS = ("INT32", "INT64", "FLOAT", "DOUBLE", "BOOLEAN")
"""What labels are stored as: pandas makes floats of integers among which some are missing."""
NO_LABEL = -1
"""The class number of a row without one, as test sets with hidden labels have it."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of one file. Picklable."""

    image: str = "image"
    field: str = "bytes"
    """Of an image that is a struct; empty for a plain binary column."""
    has_path: bool = True
    """Whether the struct has a field `path` beside the bytes."""
    label: str = "label"
    """Empty where there is none, and none is needed."""
    text: bool = False
    """Whether labels are names of classes."""
    strict: bool = dataclasses.field(default=True, repr=False)
    """Whether a label that cannot be one is refused, and not taken for none. Not in the repr, which digests are of."""

    @property
    def bytes_path(self) -> str:
        """The leaf of the images' bytes, as Parquet names it."""
        return f"{self.image}.{self.field}" if self.field else self.image

    @property
    def usual(self) -> bool:
        """Whether names and types are those of Hugging Face's image sets."""
        return (self.image, self.label, self.text) == ("image", "label", False)


def find_columns(
    metadata: Any, schema: Any, url: str, image: str = "", label: str = "", labelled: bool = True
) -> Columns:
    """Choose the columns of a file with this footer and Arrow schema; `image` and `label` name them. Not `labelled`:
    there may be no labels.

    Raises UserError that lists the columns where nothing fits, or several do.
    """
    parts = [metadata.schema.column(i) for i in range(metadata.num_columns)]
    leaves = {part.path: part.physical_type for part in parts}
    listed = ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise UserError(f"{url}: there are several columns '{twice[0]}' among {listed}: give each a name of its own")
    features = _features(schema.metadata)

    def choose(what: str, kind: str, wanted: str, names: Sequence[str], fitting: list[str], lone: list[str]) -> str:
        option = f"--data.{what}-column"
        if wanted:
            if wanted in fitting:
                return wanted
            raise UserError(f"{url}: {option} {wanted} is not {kind}; the columns are {listed}")
        typed = [name for name in fitting if features.get(name, {}).get("_type") == _TYPES[what]]
        for found in ([name for name in names if name in fitting][:1], typed, lone):
            if len(found) == 1:
                return found[0]
        several = f"{len(lone)} columns may be the {what}s" if len(lone) > 1 else f"no column of {what}s ({kind})"
        raise UserError(f"{url}: {several}, found {listed}; name it with {option}, or convert the data set")

    binary = {path for path, kind in leaves.items() if kind == "BYTE_ARRAY"}
    images = [f.name for f in schema if binary & {f.name, f"{f.name}.bytes"} and not _is_text(f)]
    numbers = [f.name for f in schema if leaves.get(f.name) in NUMBERS and not _is_measure(f)]
    texts = [f.name for f in schema if _is_text(f)]
    lone = [name for name in numbers if name.lower() not in NO_LABELS and _is_integer(schema.field(name))]
    found_image = choose("image", "binary, or a struct with a binary field 'bytes'", image, IMAGES, images, images)
    found_label = ""
    if label or labelled or any(name in LABELS for name in numbers + texts):
        found_label = choose("label", "a number, or text", label, LABELS, numbers + texts, lone)
    return Columns(
        found_image,
        "" if found_image in leaves else "bytes",
        leaves.get(f"{found_image}.path") == "BYTE_ARRAY",
        found_label,
        found_label in texts,
        labelled,
    )


_TYPES = {"image": "Image", "label": "ClassLabel"}


def class_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    """Return the names of classes that the file gives for its labels; () for none."""
    names = _features(metadata).get(label, {}).get("names")
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: value for name, value in features.items() if isinstance(value, dict)}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}  # a courtesy of the format


def _is_text(field: Any) -> bool:
    import pyarrow as pa

    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_measure(field: Any) -> bool:
    """Say whether a column that Parquet stores as integers is none: times, dates, durations, decimals."""
    import pyarrow as pa

    return bool(pa.types.is_temporal(field.type) or pa.types.is_decimal(field.type))


def _is_integer(field: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(field.type))


def label_array(column: Any, url: str, names: Sequence[str] | None = None, strict: bool = True) -> np.ndarray:
    """Return the labels as int64, NO_LABEL for rows without one; `names` are the classes of labels that are text.

    Raises UserError for a text that is no class, and for a float that is no whole number; unless `strict` these, and
    numbers that are too large, are none.
    """
    import pyarrow as pa

    if names is not None:
        import pyarrow.compute as pc

        column = plain_text(column)
        found = pc.index_in(column, value_set=pa.array(names, column.type))
        if strict and found.null_count > column.null_count:
            unknown = pc.filter(column, pc.and_(pc.is_null(found), pc.is_valid(column)))
            raise UserError(
                f"{url}: {len(unknown):,} of {len(column):,} labels are none of the {len(names)} classes of the "
                f"training set, the first is '{unknown[0]}'"
            )
        column = found
    elif pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    elif pa.types.is_floating(column.type):
        column = _whole_numbers(column if strict else _without_fractions(column), url)
    if column.null_count:
        column = column.fill_null(NO_LABEL) if pa.types.is_signed_integer(column.type) else _signed(column)
    # Arrow's to_numpy imports pandas, if it is installed: 0.9 s of the first block, in every process that loads one.
    numbers = np.from_dlpack(column.combine_chunks()) if pa.types.is_integer(column.type) else column.to_numpy()
    numbers = numbers.astype(np.int64, copy=False)
    return numbers if strict else np.where(numbers < MOST_CLASSES, numbers, NO_LABEL)


def _signed(column: Any) -> Any:
    import pyarrow as pa

    return column.cast(pa.int64()).fill_null(NO_LABEL)


def _without_fractions(column: Any) -> Any:
    import pyarrow.compute as pc

    whole = pc.and_(pc.equal(pc.trunc(column), column), pc.less(pc.abs(column), MOST_CLASSES))
    return pc.if_else(whole, column, None)


def _whole_numbers(column: Any, url: str) -> Any:
    """Return floats as integers; NaN, pandas' form of none, as null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        return pc.if_else(pc.is_nan(column), None, column).cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise UserError(f"{url}: labels of type {column.type} are no class numbers: {error}; mend them") from error


def plain_text(column: Any) -> Any:
    """Return a column of text without its dictionary, in a form that all functions of Arrow take."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.string()) if pa.types.is_string_view(column.type) else column
