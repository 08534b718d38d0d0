"""One view of a cached vector as a single memory-mapped array on this node, for rows in any order."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mimkd_ray.data.store.block_store import default_folder, locked
from mimkd_ray.teacher_cache.feature_manifest import ViewManifest
from mimkd_ray.teacher_cache.keys import THREADS
from mimkd_ray.teacher_cache.reader import read_verified

COLUMN_VIEW = 0
"""View whose vectors are used as negatives: they are of other images, so any view will do."""

COLLECT_SECONDS = 1800.0
"""For which another process may collect a column."""


class Column(NamedTuple):
    """Rows in stored form (N, row_bytes), and their ids; mapped, never to be written to."""

    rows_NB: np.ndarray
    ids_N: np.ndarray


def open_column(root: str, manifest: ViewManifest, folder: Path | None) -> Column:
    """Return the column of a view, from `folder` on this node's disk; the first process that calls this collects it
    there.

    Takes the view's size on disk, and the time of reading it once. Raises DamagedDataError for missing or damaged
    features, HeldError if another process has been at it for COLLECT_SECONDS.
    """
    place = (folder or default_folder()) / "columns"
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = f"{manifest.key}-{manifest.view:05d}-{manifest.shards[0].sha256[:8]}"
    files = [place / f"{name}.{what}.npy" for what in ("rows", "ids")]
    with locked(place / f"{name}.lock", COLLECT_SECONDS):
        if not all(file.exists() for file in files):
            _collect(root, manifest, files)
    return Column(*(np.load(file, mmap_mode="r") for file in files))


def _collect(root: str, manifest: ViewManifest, files: list[Path]) -> None:
    parts = [file.with_suffix(f".{os.getpid()}.part") for file in files]
    shapes = ((manifest.rows, manifest.row_bytes), (manifest.rows,))
    arrays = [
        np.lib.format.open_memmap(part, "w+", kind, shape)
        for part, kind, shape in zip(parts, (np.uint8, np.int64), shapes, strict=True)
    ]

    def copy(number: int) -> None:
        record, block = manifest.locate(number)
        data = np.frombuffer(read_verified(root, manifest, record, block), np.uint8)
        span = slice(manifest.blocks.start(number), manifest.blocks.start(number + 1))
        values = data[block.values_at : block.values_at + block.rows * manifest.row_bytes]
        arrays[0][span] = values.reshape(block.rows, manifest.row_bytes)
        arrays[1][span] = data[block.ids_at : block.ids_at + 8 * block.rows].view(np.int64)

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(copy, range(manifest.blocks.num_blocks)):
                pass
        for part, file, array in zip(parts, files, arrays, strict=True):
            array.flush()
            os.replace(part, file)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
