"""The order of samples: the rows of a step and a lane, as a pure function of (seed, epoch).

    blocks of the epoch, permuted  ->  their rows on one line  ->  rows shuffled inside windows of `window`
    blocks ->  the line cut into `lanes` equal contiguous pieces  ->  a lane's batches follow each other on its piece

The order does not depend on workers: any worker that carries a lane reads the same rows. The step number alone gives
the state of a run, and any step is reached by arithmetic: nothing is iterated, and no line is ever stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.data.order.random_numbers import Permutation
from mimkd_ray.errors import UserError, count


@dataclass(frozen=True)
class Order:
    """The order of a set of `blocks`; positions count through the blocks.

    Each piece of the line holds `steps_per_epoch * lane_batch` rows. The rest at the end of the line, fewer than `lanes
    * lane_batch` rows, is dropped; it differs from epoch to epoch.

    `window` = 0 is one permutation of all rows: ideal mixing, and each row may come from any block. With `window` = W >
    0 a lane has W blocks in use at a time, so a worker needs room for W blocks per lane that it carries.

    With uniform blocks, or `window` = 0, every look-up costs the same for a million rows and for a billion. Uneven
    blocks take 24 bytes a block of one epoch. Raises UserError for fewer rows than one step needs, or lanes of fewer
    than 2 images.
    """

    blocks: Blocks
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
                f"{self.lanes * self.lane_batch:,} ({count(self.lanes, 'lane')} x {self.lane_batch}); use fewer "
                "lanes, a smaller batch or more data"
            )

    @property
    def num_rows(self) -> int:
        """Number of rows of the set."""
        return self.blocks.num_rows

    @cached_property
    def steps_per_epoch(self) -> int:
        """Number of full steps in an epoch."""
        return self.num_rows // (self.lanes * self.lane_batch)

    def epoch_of(self, step: int) -> int:
        """Return the epoch (from 0) that global step `step` (from 0) belongs to."""
        return step // self.steps_per_epoch

    def positions(self, step: int, lane: int) -> np.ndarray:
        """Return the `lane_batch` positions (int64) of the rows of global step `step` and lane `lane`."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = (lane * self.steps_per_epoch + place) * self.lane_batch
        return self.stretch(epoch, start, start + self.lane_batch)

    def stretch(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the positions (int64) at places start..stop-1 of the epoch's line, the dropped tail included."""
        if self.window == 0:
            return Permutation(self.num_rows, self.seed, "rows", epoch).at(np.arange(start, stop))
        line = self._line(epoch)
        parts = []
        while start < stop:
            # One window after the other: its places on the line, shuffled inside it.
            window = line.block_place(start) // self.window
            first = line.start(window * self.window)
            end = line.start(min((window + 1) * self.window, self.blocks.num_blocks))
            shuffle = Permutation(end - first, self.seed, "window", epoch, window)
            parts.append(line.positions(first + shuffle.at(np.arange(start, min(stop, end)) - first)))
            start = end
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def _line(self, epoch: int) -> _UniformLine | _UnevenLine:
        kept = self.__dict__.get("_kept_line")
        if kept is None or kept[0] != epoch:
            permuted = Permutation(self.blocks.num_blocks, self.seed, "blocks", epoch)
            kept = epoch, (_UniformLine if self.blocks.block_rows else _UnevenLine)(self.blocks, permuted)
            object.__setattr__(self, "_kept_line", kept)
        return kept[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept_line"}  # rebuilt elsewhere


class _UniformLine:
    """Permuted uniform blocks on a line: block place p holds block `permuted[p]`. It stores no array.

    After the place of the short last block, everything begins `missing` rows earlier than in a full line.
    """

    def __init__(self, blocks: Blocks, permuted: Permutation) -> None:
        self.block_rows = blocks.block_rows
        self.permuted = permuted
        last = blocks.num_blocks - 1
        self.missing = blocks.block_rows - blocks.rows(last)
        self.short = int(permuted.places(np.array([last]))[0])
        self.short_end = self.start(self.short + 1)

    def start(self, place: int) -> int:
        return place * self.block_rows - (self.missing if place > self.short else 0)

    def block_place(self, row: int) -> int:
        return (row + (self.missing if row >= self.short_end else 0)) // self.block_rows

    def positions(self, rows: np.ndarray) -> np.ndarray:
        places, inside = np.divmod(np.where(rows >= self.short_end, rows + self.missing, rows), self.block_rows)
        # The rows of a few blocks repeat the same places.
        distinct, which = np.unique(places, return_inverse=True)
        return self.permuted.at(distinct)[which] * self.block_rows + inside


class _UnevenLine:
    """Permuted blocks of any sizes on a line: one cumulative sum per epoch."""

    def __init__(self, blocks: Blocks, permuted: Permutation) -> None:
        counts = blocks.counts
        chosen = permuted.at(np.arange(blocks.num_blocks))
        self.starts = np.concatenate([[0], np.cumsum(counts[chosen])])
        self.first_position = (np.cumsum(counts) - counts)[chosen]

    def start(self, place: int) -> int:
        return int(self.starts[place])

    def block_place(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def positions(self, rows: np.ndarray) -> np.ndarray:
        places = np.searchsorted(self.starts, rows, side="right") - 1
        return self.first_position[places] + rows - self.starts[places]


def view_number(seed: int, epoch: int, views: int) -> int:
    """Return the view number of every sample in an epoch.

    With `views` = 0 it is the epoch's number. Otherwise a keyed permutation of 0..views-1 is repeated.
    """
    return epoch if views == 0 else int(Permutation(views, seed, "views").at(np.array([epoch % views]))[0])
