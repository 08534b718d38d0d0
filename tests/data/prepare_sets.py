"""Helpers of the tests of preparation: small settings, and the content of a folder."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mimkd_ray import storage
from mimkd_ray.config import PrepareConfig
from mimkd_ray.data.prepare.make_shards import Unit
from mimkd_ray.data.prepare.work_units import Done
from mimkd_ray.data.sources.shard_manifest import Manifest


def config(source: Path, target: Path, **more: Any) -> PrepareConfig:
    return PrepareConfig(source=str(source), target=str(target), **{"block_rows": 4, "shard_rows": 16, **more})


def files(root: Path) -> dict[str, bytes]:
    """{path: content} of all below `root`, hidden ones too."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def table(root: Path, manifest: Manifest) -> list[dict[str, Any]]:
    return [row for shard in manifest.shards for row in pq.read_table(root / shard.file).to_pylist()]


class Killed(Exception):
    """Stands for SIGKILL: nothing of ours catches it."""


class Killer:
    """Does units here, and dies before the one with the given number; keeps a list of what it finished."""

    def __init__(self, at: int) -> None:
        self.left, self.finished = at, []

    def __call__(self, units: Sequence[Unit], title: str) -> Iterator[Done]:
        order = list(units)
        random.Random(self.left).shuffle(order)  # nodes finish in any order
        for unit in order:
            if self.left == 0:
                raise Killed
            self.left -= 1
            done = unit()
            self.finished.append((type(unit).__name__, unit.number))
            yield done


WRITES = 1 + 10 + 10 + 2  # settings, 5 x (blob, index), 5 x (shard, sidecar), damaged.json, manifest


class Writes:
    """storage.write_bytes that dies at the given write, before it or after it."""

    def __init__(self, at: int, after: bool) -> None:
        self.left, self.after, self.real = at, after, storage.write_bytes

    def __call__(self, url: str, data: bytes) -> None:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise Killed
        self.real(url, data)
        if self.left == 0:
            raise Killed
