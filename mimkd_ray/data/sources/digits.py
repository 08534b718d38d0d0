"""The handwritten digits of scikit-learn: 1,797 grey images of 8x8. Real data without a download.

The file is read from the package's folder; scikit-learn itself is not imported, because that takes seconds.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.data.sources.source import Row, Source, digest_of, stratified_split
from mimkd_ray.errors import UserError

VAL_ROWS = 450  # 45 of each digit; 1,347 remain for training
BLOCK_ROWS = 64
SPLIT_SEED = 0  # part of the data set's definition, not of a run


class DigitsSource(Source):
    """One split, "train" or "val", held in memory; id = position."""

    in_memory = True

    def __init__(self, split: str) -> None:
        images, labels = _load()
        train, val = stratified_split(labels, VAL_ROWS, SPLIT_SEED)
        chosen = {"train": train, "val": val}[split]
        self.split = split
        self._images = images[chosen]
        self._labels = labels[chosen]
        self.classes = tuple("0123456789")
        self.num_rows = len(chosen)
        self.blocks = Blocks.uniform(self.num_rows, BLOCK_ROWS)
        self.digest = digest_of("digits", split, self.num_rows, int(self._images.sum()))

    def read(self, positions: Sequence[int]) -> list[Row]:
        """Return rows whose images are (8, 8, 3) uint8 arrays."""
        return [Row(int(p), int(self._labels[p]), self._images[p], f"digits {self.split} row {p}") for p in positions]


@functools.cache  # a third of a second for each split
def _load() -> tuple[np.ndarray, np.ndarray]:
    """Return (images (1797, 8, 8, 3) uint8 in 0..255, labels int64)."""
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise UserError("the digits come with scikit-learn, which is not installed: pip install scikit-learn")
    path = Path(found.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    if not path.exists():
        raise UserError(f"this scikit-learn has no {path}; install another version, or give --data.root")
    text = gzip.decompress(path.read_bytes()).replace(b"\n", b",").rstrip(b",")
    table = np.array(text.split(b","), dtype=np.float64).reshape(-1, 65)  # 64 pixels of 0..16 and the label
    grey = np.rint(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return np.repeat(grey, 3, axis=3), table[:, 64].astype(np.int64)
