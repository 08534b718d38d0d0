"""The interface of a data set: rows with stable ids, in blocks, read by position.

Two words that are easy to confuse:

* **position**: 0 .. num_rows-1 within one source. `read` takes positions; `blocks` and `labels()` are in their order.
* **id**: the row's number in the stored data set. It identifies the sample permanently: views and cached features
  depend on it.

For a source of a whole split, position and id are the same number. A subset renumbers positions but not ids.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mimkd_ray.config.data import MOST_CLASSES
from mimkd_ray.data.augment.decode import DECODING, Decoding, Encoded
from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.data.order.random_numbers import permutation, raw
from mimkd_ray.data.store.block_store import BlockStore
from mimkd_ray.errors import UserError


class Row(NamedTuple):
    """One sample as stored: `image` is an encoded file, perhaps a part of a mapped one, or (H, W, 3) uint8; `name` says
    where; `how` it is decoded."""

    id: int
    label: int
    image: Encoded | np.ndarray
    name: str
    how: Decoding = DECODING


class Source(ABC):
    """One split of a data set. Cheap to open, picklable, and safe to use in forked processes.

    As it is here: with known labels, and rows that are read where they are, without a store.
    """

    classes: tuple[str, ...]
    """Class names; the label is the index."""
    num_rows: int
    """Number of rows."""
    blocks: Blocks
    """The blocks (units of reading), in the order of positions."""
    digest: str
    """A cheap identity from names, sizes and row counts; it does not depend on the content of images."""
    in_memory: bool = False
    """True if rows are held in memory, decoded: loader processes would cost more than they save."""
    store: BlockStore | None = None
    """Store of the blocks that were read; None: rows are read in place."""
    block_bytes: int = 0
    """Mean size of a stored block, in bytes; 0 if there is no store."""
    distant: bool = False
    """True if fetching a block waits for a network, False if it only verifies data on this machine's disk."""
    _labels: np.ndarray

    def labels(self) -> np.ndarray:
        """Return all labels, int64, by position. May read the label column of every block."""
        return self._labels

    def label_range(self) -> tuple[int, int]:
        """Return bounds (smallest, largest) of the labels, without reading image data."""
        return int(self._labels.min()), int(self._labels.max())

    @abstractmethod
    def read(self, positions: Sequence[int]) -> list[Row]:
        """Return the rows at `positions`, in that order."""

    def fetch(self, block: int) -> bool:
        """Fetch the block into the store; return whether it is there. Raises the errors of `read`."""
        return False

    def read_again(self, position: int) -> Row | None:
        """Return a row whose image cannot be decoded as its block has it now, loaded and verified anew; None if that
        cannot differ. Raises the errors of `read`."""
        return None


class SubsetSource(Source):
    """The rows of `parent` at the given sorted, distinct positions.

    Positions are renumbered from 0; `Row.id` stays the parent's, so views and caches of a sample do not change. A block
    is the remaining part of the parent's block; empty ones are dropped.
    """

    def __init__(self, parent: Source, positions: Sequence[int] | np.ndarray) -> None:
        kept = np.asarray(positions, dtype=np.int64)
        if len(kept) and (kept[0] < 0 or kept[-1] >= parent.num_rows or np.any(np.diff(kept) <= 0)):
            raise ValueError("positions must be sorted, distinct and within the parent")
        self.parent = parent
        self.kept = kept
        self._parent_block, counts = np.unique(parent.blocks.locate(kept)[0], return_counts=True)
        self.blocks = Blocks.of(counts)
        self.classes = parent.classes
        self.num_rows = len(kept)
        self.digest = digest_of("subset", parent.digest, hashlib.sha256(kept.tobytes()).hexdigest())
        self.in_memory = parent.in_memory
        self.store = parent.store
        self.block_bytes = parent.block_bytes
        self.distant = parent.distant

    def labels(self) -> np.ndarray:
        """Return the labels of the kept rows, int64."""
        return self.parent.labels()[self.kept]

    def label_range(self) -> tuple[int, int]:
        """Return the parent's bounds."""
        return self.parent.label_range()

    def read(self, positions: Sequence[int]) -> list[Row]:
        """Return the rows at `positions` of this subset (0..num_rows-1), with the parent's ids."""
        return self.parent.read([int(self.kept[p]) for p in positions])

    def read_again(self, position: int) -> Row | None:
        """Return the parent's row, loaded anew."""
        return self.parent.read_again(int(self.kept[position]))

    def fetch(self, block: int) -> bool:
        """Fetch the parent's whole block, of which this subset's `block` is a part."""
        return self.parent.fetch(int(self._parent_block[block]))


def numbered_classes(highest: int, where: str) -> tuple[str, ...]:
    """Return names for classes 0..highest that have none. Raises UserError for what cannot be class numbers."""
    if highest >= MOST_CLASSES:
        raise UserError(
            f"{where} has labels up to {highest:,}, and class numbers go up to {MOST_CLASSES - 1:,}: mend them, or "
            "name another column with --data.label-column"
        )
    return tuple(map(str, range(highest + 1)))


def numbers_in_names(classes: Sequence[str]) -> tuple[int, ...] | None:
    """Return the numbers that classes have as names, such as the folders 0 to 999 of ImageNetV2, whose order as text is
    another; None where some have other names."""
    numbers = tuple(int(name) for name in classes if name.isdecimal())
    return numbers if numbers and len(set(numbers)) == len(classes) else None


def ids_of(source: Source) -> np.ndarray:
    """Return the ids of all rows by position: int64, ascending. Reads nothing."""
    if isinstance(source, SubsetSource):
        return ids_of(source.parent)[source.kept]
    return np.arange(source.num_rows, dtype=np.int64)


def stratified_split(labels: np.ndarray, share_or_count: float | int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose rows class by class; return (rest, chosen), both sorted positions, int64.

    A float in (0, 1) chooses that share of every class. An int chooses this many rows, the same number of each class as
    far as classes have them. A remainder is assigned to classes by keyed random numbers. Raises UserError for too many.
    """
    if len(labels) and labels.min() < 0:
        labels = labels.clip(min=-1) + 1  # rows without a label are a class of their own
    sizes = np.bincount(labels) if len(labels) else np.zeros(1, dtype=np.int64)
    if isinstance(share_or_count, float):
        count = round(share_or_count * len(labels))
        quota = np.floor(sizes * share_or_count).astype(np.int64)
        remainder = sizes * share_or_count - quota
    else:
        count = share_or_count
        quota = _equal_quota(sizes, count)
        remainder = np.zeros(len(sizes))
    if not 0 <= count <= len(labels):
        raise UserError(f"cannot choose {count:,} rows of a set of {len(labels):,}")
    # One more row for some classes completes the count: those with the largest remainder, ties by chance.
    order = np.lexsort((raw(len(sizes), seed, "split classes"), -remainder))
    open_classes = order[quota[order] < sizes[order]]
    quota[open_classes[: max(0, count - int(quota.sum()))]] += 1

    # Rank each row among its class in a keyed shuffle, and take the first `quota` of each class.
    shuffled = permutation(len(labels), seed, "split rows")
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    starts = np.cumsum(sizes) - sizes
    rank = np.arange(len(labels)) - np.repeat(starts, sizes)
    taken = np.zeros(len(labels), dtype=bool)
    taken[by_class] = rank < np.repeat(quota, sizes)
    return np.flatnonzero(~taken), np.flatnonzero(taken)


def _equal_quota(sizes: np.ndarray, count: int) -> np.ndarray:
    """Return min(size, level) per class for the largest whole level whose sum is at most `count`."""
    low, high = 0, int(sizes.max(initial=0))
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if np.minimum(sizes, level).sum() <= count else (low, level - 1)
    return np.minimum(sizes, low).astype(np.int64)


def digest_of(*parts: object) -> str:
    """Return 16 hex digits over the parts' reprs, in order."""
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:16]
