"""Row groups of features as raw bytes in the block store that the images lie in, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mimkd_ray.data.store import BlockStore


def raw_block(store: BlockStore | None, key: str, load: Callable[[], bytes]) -> np.ndarray:
    """Return the bytes (uint8, not to be written to) of a row group: mapped from the store, which `load` fills once for
    all processes of the node; without a store, what `load` gives."""
    if store is None:
        return np.frombuffer(load(), np.uint8)
    column = store.get(_name(key), lambda: _as_table(load())).column("image").chunk(0)
    start, stop = np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + 2]
    return np.frombuffer(column.buffers()[2], np.uint8)[start:stop]


def fetch_raw(store: BlockStore, key: str, load: Callable[[], bytes]) -> bool:
    """See to it that a row group is in the store; say whether it is (False: there is no room for it)."""
    return store.fetch(_name(key), lambda: _as_table(load()))


def _name(key: str) -> str:
    return f"feature {key}"


def _as_table(data: bytes) -> Any:
    import pyarrow as pa

    return pa.table({"image": pa.array([data], pa.large_binary()), "label": pa.array([0])})
