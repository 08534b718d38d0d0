"""The row counts of a data set's blocks: the start of each block, and the block of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False, slots=True)
class Blocks:
    """Consecutive blocks of rows, made by `uniform` or `of`. Positions count the rows through all of them, from 0.

    Uniform blocks (all of `block_rows` rows; only the last may be shorter) need no arrays, whatever the size of the
    set. Other blocks take 8 bytes each. Immutable, hashable, picklable.
    """

    num_rows: int
    num_blocks: int
    block_rows: int
    """Of every block except the last; 0: the blocks are uneven."""
    _ends: np.ndarray | None = field(repr=False)
    """Of uneven blocks: the position after each."""

    @classmethod
    def uniform(cls, num_rows: int, block_rows: int) -> Blocks:
        """Return blocks of `block_rows` rows; the last one holds the rest. Raises ValueError for block_rows < 1."""
        if block_rows < 1 or num_rows < 0:
            raise ValueError(f"{num_rows} rows in blocks of {block_rows}: blocks hold at least one row")
        return cls(num_rows, -(-num_rows // block_rows), block_rows, None)

    @classmethod
    def of(cls, counts: Sequence[int] | np.ndarray) -> Blocks:
        """Return blocks of the given row counts (empty ones are allowed), as uniform ones if they are."""
        rows = np.asarray(counts, dtype=np.int64)
        if np.any(rows < 0):
            raise ValueError("a block cannot hold fewer than 0 rows")
        if not len(rows) or (0 < rows[-1] <= rows[0] and np.all(rows[:-1] == rows[0])):
            return cls.uniform(int(rows.sum()), int(rows[0]) if len(rows) else 1)
        return cls(int(rows.sum()), len(rows), 0, np.cumsum(rows))

    @property
    def counts(self) -> np.ndarray:
        """Rows of each block, int64; makes an array of `num_blocks` numbers."""
        if self._ends is not None:
            return np.diff(self._ends, prepend=0)
        counts = np.full(self.num_blocks, self.block_rows, dtype=np.int64)
        counts[-1:] = self.num_rows - self.block_rows * (self.num_blocks - 1)
        return counts

    def start(self, block: int) -> int:
        """Return the position of the block's first row; for block `num_blocks`, the number of rows."""
        if self._ends is not None:
            return int(self._ends[block - 1]) if block else 0
        return min(block * self.block_rows, self.num_rows)

    def rows(self, block: int) -> int:
        """Return the block's number of rows."""
        return self.start(block + 1) - self.start(block)

    def locate(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (block, row in the block) of each position, int64."""
        places = np.asarray(positions, dtype=np.int64)
        if self._ends is None:
            blocks, rows = np.divmod(places, self.block_rows)
            return blocks, rows
        blocks = np.searchsorted(self._ends, places, side="right")
        return blocks, places - np.where(blocks > 0, self._ends[blocks - 1], 0)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Blocks):
            return NotImplemented
        mine, theirs = self._ends, other._ends
        return self._sizes() == other._sizes() and (
            np.array_equal(mine, theirs) if mine is not None and theirs is not None else mine is theirs
        )

    def __hash__(self) -> int:
        return hash(self._sizes())

    def _sizes(self) -> tuple[int, int, int]:
        return self.num_rows, self.num_blocks, self.block_rows
