"""The manifest of a prepared split: its shards, the place of each block, and the digests of their bytes.

A prepared set is `ROOT/<split>-00000-of-00012.parquet`, ... and `ROOT/<split>.manifest.json`. The manifest is written
last, so a folder without one is not a prepared set, whatever else it holds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mimkd_ray import storage
from mimkd_ray.data.sources.source import digest_of
from mimkd_ray.errors import UserError

MANIFEST_SUFFIX = ".manifest.json"
VERSION = 1


class Block(NamedTuple):
    """One row group: `length` bytes at `offset` of its file hold exactly its column chunks."""

    offset: int
    length: int
    rows: int
    sha256: str


class Shard(NamedTuple):
    """One Parquet file, named relative to the root; `sha256` covers all its bytes, including the footer."""

    file: str
    rows: int
    bytes: int
    sha256: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One prepared split. Construction checks that the numbers agree with each other, and raises ValueError."""

    split: str
    """Name of the split, with which file names begin."""
    rows: int
    """Images in the split; their ids are 0..rows-1 in file order."""
    block_rows: int
    """Rows of every block except the very last one, which may have fewer."""
    classes: tuple[str, ...]
    """Class names; the label is the index."""
    digest: str
    """16 hex digits over classes, rows and the content of every shard: `content_digest`."""
    damaged: int
    """Images of the source that were left out."""
    settings: dict[str, Any]
    """Source and settings of the preparation."""
    shards: tuple[Shard, ...]
    """The files, in the order of ids."""

    def __post_init__(self) -> None:
        blocks = [block for shard in self.shards for block in shard.blocks]
        if not blocks or self.rows < 1 or self.block_rows < 1 or self.damaged < 0:
            raise ValueError(f"{self.rows} rows in {len(blocks)} blocks of {self.block_rows}, {self.damaged} damaged")
        full, rest = divmod(self.rows, self.block_rows)
        if [block.rows for block in blocks] != [self.block_rows] * full + [rest] * (rest > 0):
            raise ValueError(f"{len(blocks)} blocks do not hold {self.rows} rows in blocks of {self.block_rows}")
        for shard in self.shards:
            if shard.rows != sum(block.rows for block in shard.blocks):
                raise ValueError(f"the blocks of {shard.file} do not hold its {shard.rows} rows")
            end = 0
            for number, block in enumerate(shard.blocks):
                if block.offset < end or block.length < 1 or block.offset + block.length > shard.bytes:
                    raise ValueError(
                        f"block {number} of {shard.file} is {block.length} bytes at {block.offset}: outside the file "
                        f"of {shard.bytes} bytes, or over the block before it, which ends at {end}"
                    )
                end = block.offset + block.length
        if self.digest != (right := content_digest(self.classes, self.shards)):
            raise ValueError(f"its digest is {self.digest}, and its content has {right}")


def content_digest(classes: Sequence[str], shards: Sequence[Shard]) -> str:
    """Return the identity of a prepared split, 16 hex digits: equal if classes, rows and every byte are equal."""
    return digest_of("prepared", tuple(classes), tuple(tuple(shard) for shard in shards))


def manifest_url(root_url: str, split: str) -> str:
    """Return the URL of the manifest of `split`."""
    return storage.join(root_url, split + MANIFEST_SUFFIX)


def read_manifest(root_url: str, split: str) -> Manifest | None:
    """Return the manifest of a prepared split; None if there is none. One or two requests.

    Raises UserError for a manifest that is truncated, was edited, or has an unknown version.
    """
    url = manifest_url(root_url, split)
    try:
        text = storage.read_bytes(url)
    except FileNotFoundError:
        return None
    try:
        value = json.loads(text)
        if value["version"] != VERSION:
            raise ValueError(f"it has version {value['version']}, this program reads version {VERSION}")
        if value["split"] != split:
            raise ValueError(f"it is of split '{value['split']}'")
        shards = tuple(
            Shard(**{**shard, "blocks": tuple(Block(*block) for block in shard["blocks"])}) for shard in value["shards"]
        )
        fields = {field.name: value[field.name] for field in dataclasses.fields(Manifest)}
        return Manifest(**{**fields, "classes": tuple(value["classes"]), "shards": shards})
    except KeyError as error:
        raise UserError(f"{url}: the manifest has no entry {error}; copy it again, or prepare the set anew") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{url}: the manifest is wrong: {error}; copy it again, or prepare the set anew") from error


def write_manifest(root_url: str, manifest: Manifest) -> None:
    """Write the manifest of a split whose shards are all in place; this makes the set a prepared one."""
    shards = [{**shard._asdict(), "blocks": [list(block) for block in shard.blocks]} for shard in manifest.shards]
    fields = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(Manifest)}
    value = {"version": VERSION, **fields, "shards": shards}
    storage.write_bytes(manifest_url(root_url, manifest.split), (json.dumps(value, indent=1) + "\n").encode())
