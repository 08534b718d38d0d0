"""One view of a cached vector as a single memory-mapped array on this node, for rows in any order."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from mimkd_ray.data.store.block_store import BlockStore
from mimkd_ray.data.store.locks import locked
from mimkd_ray.local_files import publish
from mimkd_ray.storage import explained
from mimkd_ray.teacher_cache.feature_manifest import FeatureBlock, ViewManifest
from mimkd_ray.teacher_cache.feature_reader import read_verified
from mimkd_ray.teacher_cache.keys import THREADS

COLUMN_VIEW = 0
"""View whose vectors are used as negatives: they are of other images, so any view will do."""

COLLECT_SECONDS = 1800.0
"""For which another process may collect a column."""

UNUSED_SECONDS, LEFT_SECONDS = 30 * 86400.0, 86400.0
"""Columns that no run has opened for so long are removed (the store's own limit does not count them), and what killed
processes left of one."""

AT_A_TIME = 4 * THREADS
"""Row groups, of at most 1,024 images each, that are in memory while a column is collected."""


class Column(NamedTuple):
    """Rows in stored form (N, row_bytes), and their ids; mapped, never to be written to."""

    rows_NB: np.ndarray
    ids_N: np.ndarray


def open_column(root: str, manifest: ViewManifest, folder: Path | str) -> Column:
    """Return the column of a view, from the block store `folder` on this node's disk ("": the default one); the first
    process that calls this collects it there.

    Takes the view's size on disk, and the time of reading it once. Raises DamagedDataError for missing or damaged
    features, HeldError if another process has been at it for COLLECT_SECONDS, UserError for a full disk.
    """
    store = BlockStore(folder)
    store.prepare()
    place = store.folder / "columns"
    place.mkdir(mode=0o700, exist_ok=True)
    name = f"{manifest.key}-{manifest.view:05d}-{manifest.shards[0].sha256[:8]}"
    files = [place / f"{name}.{what}.npy" for what in ("rows", "ids")]
    _remove_unused(place)
    with locked(place / f"{name}.lock", COLLECT_SECONDS) as lock:
        if not all(file.exists() for file in files):
            for left in place.glob(f".{name}.*"):  # by a process that was killed
                left.unlink()
            with explained(str(place), "write to"):
                publish(files[0], lambda rows: publish(files[1], lambda ids: _collect(root, manifest, rows, ids)))
        for file in files:
            os.utime(file)
        os.utime(lock)
    return Column(*(np.load(file, mmap_mode="r") for file in files))


def _remove_unused(place: Path) -> None:
    """Remove old columns; a process that has one mapped keeps it."""
    for file in place.iterdir():
        with suppress(FileNotFoundError):  # another process removes it
            limit = LEFT_SECONDS if file.suffix == ".tmp" else UNUSED_SECONDS
            if time.time() - file.stat().st_mtime > limit:
                file.unlink()


def _collect(root: str, manifest: ViewManifest, rows: BinaryIO, ids: BinaryIO) -> None:
    """Write the two arrays, as files of NumPy."""
    for out, kind, shape in ((rows, "|u1", (manifest.rows, manifest.row_bytes)), (ids, "<i8", (manifest.rows,))):
        np.lib.format.write_array_header_1_0(out, {"descr": kind, "fortran_order": False, "shape": shape})

    def read(number: int) -> tuple[FeatureBlock, memoryview]:
        record, block = manifest.locate(number)
        return block, memoryview(read_verified(root, manifest, record, block))

    with ThreadPoolExecutor(THREADS) as pool:
        for numbers in np.array_split(range(manifest.blocks.num_blocks), -(-manifest.blocks.num_blocks // AT_A_TIME)):
            for block, data in pool.map(read, numbers.tolist()):
                rows.write(data[block.values_at : block.values_at + block.rows * manifest.row_bytes])
                ids.write(data[block.ids_at : block.ids_at + 8 * block.rows])
