"""The order of samples: the rows of a step and a lane, as a pure function of (seed, epoch).

    blocks of the epoch, permuted  ->  their rows on one line  ->  rows shuffled inside windows of `window`
    blocks ->  the line cut into `lanes` equal contiguous pieces  ->  a lane's batches lie one behind the
    other on its piece

Workers do not occur here: whoever carries a lane reads the same rows. The step number alone says where a run
is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mimkd_ray.data.keyed import permutation, raw
from mimkd_ray.errors import UserError


@dataclass(frozen=True)
class Order:
    """The order of a set whose blocks hold `block_rows` rows; positions count through the blocks.

    Each piece of the line holds `steps_per_epoch * lane_batch` rows. What is left at the end of the line,
    fewer than `lanes * lane_batch` rows, is dropped; it differs from epoch to epoch.

    `window` = 0 is one permutation of all rows: ideal mixing, and each row is read from any block. With
    `window` = W > 0 a lane has W blocks in use at a time, so a worker needs room for W blocks per lane it
    carries.

    One epoch's line is kept (8 bytes a row); making it costs a sort (0.2 s for 1.3 million rows).
    Raises UserError for fewer rows than one step needs, or lanes of fewer than 2.
    """

    block_rows: tuple[int, ...]
    lanes: int
    lane_batch: int
    seed: int
    window: int = 0

    def __post_init__(self) -> None:
        if self.lanes < 1:
            raise UserError(f"lanes = {self.lanes}: at least 1 is needed")
        if self.lane_batch < 2:
            raise UserError(
                f"lane_batch = {self.lane_batch}: a lane needs at least 2 images, because an image's "
                "negatives are the others of its lane; use fewer lanes or a larger batch"
            )
        if self.window < 0:
            raise UserError(f"window = {self.window}: give 0 (one permutation of all rows) or a number of blocks")
        if self.num_rows < self.lanes * self.lane_batch:
            raise UserError(
                f"the training set has {self.num_rows:,} rows, and one step needs "
                f"{self.lanes * self.lane_batch:,} ({self.lanes} lanes x {self.lane_batch}); use fewer "
                "lanes, a smaller batch or more data"
            )

    @cached_property
    def num_rows(self) -> int:
        """Rows of the set."""
        return sum(self.block_rows)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Full steps that the rows are enough for."""
        return self.num_rows // (self.lanes * self.lane_batch)

    def epoch_of(self, step: int) -> int:
        """Return the epoch (from 0) that global step `step` (from 0) belongs to."""
        return step // self.steps_per_epoch

    def positions(self, step: int, lane: int) -> np.ndarray:
        """Return the `lane_batch` positions (int64) of the rows of global step `step` and lane `lane`."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = (lane * self.steps_per_epoch + place) * self.lane_batch
        return self.line(epoch)[start : start + self.lane_batch]

    def line(self, epoch: int) -> np.ndarray:
        """Return all positions along the epoch's line (int64, read-only), the dropped tail included."""
        cached = self.__dict__.get("_line")
        if cached is not None and cached[0] == epoch:
            return cached[1]
        line = self._make_line(epoch)
        line.setflags(write=False)
        object.__setattr__(self, "_line", (epoch, line))
        return line

    def _make_line(self, epoch: int) -> np.ndarray:
        if self.window == 0:
            return permutation(self.num_rows, self.seed, "rows", epoch)
        rows = np.array(self.block_rows, dtype=np.int64)
        blocks = permutation(len(rows), self.seed, "blocks", epoch)
        counts = rows[blocks]
        # Block by block on the line: its first position, repeated, plus 0, 1, 2, ... within it.
        first = (np.cumsum(rows) - rows)[blocks]
        line = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(self.num_rows)
        windows = np.repeat(np.arange(len(rows)) // self.window, counts)
        return line[np.lexsort((raw(self.num_rows, self.seed, "rows", epoch), windows))]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_line"}  # made anew elsewhere


def view_number(seed: int, epoch: int, views: int) -> int:
    """Return the view of every sample in an epoch.

    With `views` = 0 each epoch has its own (the epoch's number). Else a keyed permutation of 0..views-1 is
    gone through again and again.
    """
    return epoch if views == 0 else int(permutation(views, seed, "views")[epoch % views])
