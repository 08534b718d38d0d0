"""Commit records of features, and the manifest that selects among them.

    ROOT/<key>/view-00003/<first>-<stop>-<content's sha256>.parquet   features of positions first..stop-1
    ROOT/<key>/view-00003/<first>-<stop>-<content's sha256>.json      its record, written after it
    ROOT/<key>/view-00003.manifest.json                               one record for each shard, create-once

Names end in their content's digest, so no object is overwritten with other content: a retried unit or a second builder
adds objects, and readers use only the manifest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Any, NamedTuple

import numpy as np

from mimkd_ray import storage
from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.errors import DamagedDataError
from mimkd_ray.teacher_cache.keys import FORMAT, THREADS

MANIFEST_SUFFIX = ".manifest.json"
_VIEW = re.compile(r"view-(\d{5,})\.manifest\.json")


class FeatureBlock(NamedTuple):
    """One row group: `length` bytes at `offset` of its file. Ids and features are plain arrays in them."""

    offset: int
    length: int
    rows: int
    sha256: str
    ids_at: int
    """Start of the int64 ids, in bytes from `offset`."""
    values_at: int
    """Start of the features, in bytes from `offset`."""


class Error(NamedTuple):
    """Error of storage: sums over a shard, and the worst row's relative error."""

    squared_error: float
    squared_norm: float
    worst: float

    @property
    def relative(self) -> float:
        """Relative L2 error."""
        return sqrt(self.squared_error / self.squared_norm) if self.squared_norm > 0 else 0.0


class Record(NamedTuple):
    """The features of positions `first` .. `first + rows - 1` in one view, in one file."""

    first: int
    rows: int
    file: str
    """Name of the file, in the view's folder."""
    bytes: int
    sha256: str
    """sha256 of the whole file."""
    blocks: tuple[FeatureBlock, ...]
    footer: tuple[int, int, str]
    """(offset, length, sha256) of the bytes after the row groups."""
    damaged: tuple[int, ...]
    """Ids of images that could not be decoded: their features are zeros and must not be used."""
    error: Error


@dataclass(frozen=True, kw_only=True)
class ViewManifest:
    """All features of one key and view. Construction checks that the numbers agree, and raises ValueError."""

    key: str
    view: int
    row_bytes: int
    shards: tuple[Record, ...]
    """Shards in the order of positions, which they cover without a gap."""

    def __post_init__(self) -> None:
        at = 0
        for shard in self.shards:
            if shard.first != at or shard.rows != sum(block.rows for block in shard.blocks) or shard.rows < 1:
                raise ValueError(f"{shard.file} holds {shard.rows} rows from {shard.first} on, expected from {at} on")
            end = 0
            for block in shard.blocks:
                inside = max(block.ids_at + 8 * block.rows, block.values_at + self.row_bytes * block.rows)
                if block.offset < end or inside > block.length or min(block.ids_at, block.values_at) < 0:
                    raise ValueError(f"the blocks of {shard.file} overlap, or are too short for their rows")
                end = block.offset + block.length
            if self.row_bytes < 1 or shard.footer[0] < end or sum(shard.footer[:2]) != shard.bytes:
                raise ValueError(f"the blocks of {shard.file} do not fit its {shard.bytes} bytes")
            at += shard.rows

    @cached_property
    def rows(self) -> int:
        """Number of rows of the training set."""
        return sum(shard.rows for shard in self.shards)

    @cached_property
    def bytes(self) -> int:
        """Size of all files in bytes."""
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def blocks(self) -> Blocks:
        """The row groups of all shards, in order."""
        return Blocks.of([block.rows for shard in self.shards for block in shard.blocks])

    @cached_property
    def first_block(self) -> np.ndarray:
        """Number of each shard's first block, followed by the number of all blocks."""
        return np.cumsum([0, *(len(shard.blocks) for shard in self.shards)])

    @cached_property
    def damaged(self) -> np.ndarray:
        """Ids without features, int64."""
        return np.array([id for shard in self.shards for id in shard.damaged], dtype=np.int64)

    @cached_property
    def error(self) -> Error:
        """Error of storage over all rows."""
        errors = [shard.error for shard in self.shards]
        return Error(
            sum(e.squared_error for e in errors), sum(e.squared_norm for e in errors), max(e.worst for e in errors)
        )

    def locate(self, block: int) -> tuple[Record, FeatureBlock]:
        """Return the shard that holds a block, and the block."""
        shard = int(np.searchsorted(self.first_block, block, side="right")) - 1
        return self.shards[shard], self.shards[shard].blocks[block - int(self.first_block[shard])]


def shard_name(first: int, rows: int) -> str:
    """Return the prefix of the names of a shard's objects."""
    return f"{first:010d}-{first + rows:010d}"


def view_url(root: str, key: str, view: int) -> str:
    """Return the folder of a view's features."""
    return storage.join(root, key, f"view-{view:05d}")


def manifest_url(root: str, key: str, view: int) -> str:
    """Return the URL of the manifest of a view."""
    return view_url(root, key, view) + MANIFEST_SUFFIX


def record_url(root: str, key: str, view: int, file: str) -> str:
    """Return the URL of the record of a feature file."""
    return storage.join(view_url(root, key, view), file.removesuffix(".parquet") + ".json")


def views_there(root: str, key: str) -> set[int]:
    """Return the views that have a manifest. Makes one listing."""
    names = (url.rpartition("/")[2] for url in storage.list_files(storage.join(root, key), MANIFEST_SUFFIX))
    return {int(match[1]) for name in names if (match := _VIEW.fullmatch(name))}


def to_json(value: Any) -> bytes:
    """Return compact JSON that is the same for the same value."""
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def parse_record(value: Any) -> Record:
    """Return the record of parsed JSON. Raises TypeError or ValueError."""
    record = Record(*value)
    offset, length, sha256 = record.footer
    return record._replace(
        blocks=tuple(FeatureBlock(*block) for block in record.blocks),
        footer=(offset, length, sha256),
        damaged=tuple(record.damaged),
        error=Error(*record.error),
    )


def committed(root: str, key: str, view: int) -> dict[tuple[int, int], Record]:
    """Return {(first, rows): record} of the committed records of a view whose files are there in full size.

    Of several for the same rows, the one whose name comes first. Truncated records are ignored.
    """
    sizes = {url.rpartition("/")[2]: size for url, size in storage.list_sizes(view_url(root, key, view)).items()}

    def read(name: str) -> Record | None:
        try:
            record = parse_record(json.loads(storage.read_bytes(storage.join(view_url(root, key, view), name), True)))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return record if sizes.get(record.file) == record.bytes else None

    names = sorted(name for name in sizes if name.endswith(".json"))
    found: dict[tuple[int, int], Record] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for record in pool.map(read, names):
            if record is not None:
                found.setdefault((record.first, record.rows), record)
    return found


def publish(root: str, manifest: ViewManifest) -> bool:
    """Write the manifest unless the view already has one; readers then see the view. Returns whether this one was
    written."""
    value = {
        "format": FORMAT,
        "key": manifest.key,
        "view": manifest.view,
        "row_bytes": manifest.row_bytes,
        "shards_sha256": hashlib.sha256(to_json(manifest.shards)).hexdigest(),
        "shards": manifest.shards,
    }
    return storage.create_once(manifest_url(root, manifest.key, manifest.view), to_json(value))


def read_manifest(root: str, key: str, view: int) -> ViewManifest | None:
    """Return the manifest of a view; None if there is none. Raises DamagedDataError for an invalid one."""
    url = manifest_url(root, key, view)
    try:
        value = json.loads(storage.read_bytes(url, small=True))
        if value["format"] != FORMAT or (value["key"], value["view"]) != (key, view):
            raise ValueError(f"it is of format {value['format']}, key {value['key']} and view {value['view']}")
        shards: Sequence[Any] = value["shards"]
        if hashlib.sha256(to_json(shards)).hexdigest() != value["shards_sha256"]:
            raise ValueError("its list of shards has changed since it was written")
        return ViewManifest(
            key=key, view=view, row_bytes=int(value["row_bytes"]), shards=tuple(map(parse_record, shards))
        )
    except FileNotFoundError:
        return None
    except (KeyError, ValueError, TypeError) as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else error
        raise DamagedDataError(
            f"{url}: the manifest is wrong: {said}; remove it and give the build command again, which makes it anew "
            "from what is there"
        ) from error
