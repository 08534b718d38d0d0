"""Small caches that are written directly, without a teacher."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mimkd_ray.teacher_cache.feature_manifest import Error, Record, ViewManifest, publish
from mimkd_ray.teacher_cache.writer import write_shard

KEY = "0" * 24
SHARDS = ((16, 16, 5), (16, 11))
ROWS = 64
NOTHING_LOST = Error(0.0, 1.0, 0.0)


def features(width: int = 40, view: int = 0, rows: int = ROWS) -> np.ndarray:
    """(rows, width) uint8: random bytes."""
    return np.random.default_rng(view + 100 * width).integers(0, 256, (rows, width), dtype=np.uint8)


def ids(rows: int = ROWS) -> np.ndarray:
    """Ids that are not positions."""
    return np.arange(rows, dtype=np.int64) * 3 + 7


def write_shards(root: Path, key: str = KEY, width: int = 40, view: int = 0) -> list[Record]:
    """Write the shards of a view, and no manifest."""
    values, first, records = features(width, view), 0, []
    for counts in SHARDS:
        part = slice(first, first + sum(counts))
        records.append(write_shard(str(root), key, view, first, ids()[part], values[part], counts, (), NOTHING_LOST))
        first += sum(counts)
    return records


def write_view(root: Path, key: str = KEY, width: int = 40, view: int = 0) -> ViewManifest:
    """Write a whole view."""
    manifest = ViewManifest(key=key, view=view, row_bytes=width, shards=tuple(write_shards(root, key, width, view)))
    assert publish(str(root), manifest)
    return manifest
