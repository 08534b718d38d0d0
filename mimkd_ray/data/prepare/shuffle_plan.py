"""The arithmetic of data preparation: the place of each row in the shuffle, and the bytes of each part in a shard."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mimkd_ray.data.prepare.input_pieces import Origin
from mimkd_ray.data.prepare.work_units import Index, ShardUnit, class_keys
from mimkd_ray.errors import UserError

SHARD_BYTES = 256 * 10**6  # of a shard by default; writing holds it twice in memory
MAX_BLOCK_BYTES = 10**9  # a column of Arrow's binary type ends at 2 GiB


def row_keys(origin: Origin, seed: int) -> list[np.ndarray | None]:
    """Return the key of every row, by piece; rows of a class get the class's keys in the order of the source."""
    if origin.labels is None:
        return [None] * len(origin.pieces)
    labels = np.concatenate(origin.labels)
    keys = np.empty(len(labels))
    by_class = np.argsort(labels, kind="stable")
    values, starts = np.unique(labels[by_class], return_index=True)
    for label, rows in zip(values, np.split(by_class, starts[1:]), strict=True):
        keys[rows] = class_keys(len(rows), seed, int(label))
    return list(np.split(keys, np.cumsum([len(of_piece) for of_piece in origin.labels])[:-1]))


def plan_shards(
    *,
    indices: Sequence[Index],
    split: str,
    block_rows: int,
    shard_rows: int,
    classes: tuple[str, ...],
    target: str,
    work: str,
) -> list[ShardUnit]:
    """Rank all rows by key, cut the ranks into shards, and find each shard's range of bytes in every part.

    Rows are ranked by (key, part, place in the part); a part already holds its rows in that order, so a shard takes one
    range of each part. `shard_rows` 0 gives shards of about SHARD_BYTES. Raises UserError for blocks that are too
    large.
    """
    counts = [len(index.keys) for index in indices]
    rows = sum(counts)
    ranks = np.empty(rows, dtype=np.int64)
    ranks[np.argsort(np.concatenate([index.keys for index in indices]), kind="stable")] = np.arange(rows)
    mean_bytes = sum(sum(index.lengths) for index in indices) / rows
    if block_rows * mean_bytes > MAX_BLOCK_BYTES:
        most = max(1, int(MAX_BLOCK_BYTES / mean_bytes))
        raise UserError(
            f"--block-rows {block_rows}: a block of images of {mean_bytes / 1e6:,.1f} MB would be larger than "
            f"{MAX_BLOCK_BYTES / 1e9:.0f} GB; give {most} or fewer"
        )
    shard_rows = shard_rows or max(1, round(SHARD_BYTES / mean_bytes / block_rows)) * block_rows
    shards = -(-rows // shard_rows)
    edges = np.arange(shards + 1) * shard_rows
    ranges: list[list[tuple[int, int, int]]] = [[] for _ in range(shards)]
    for part, (index, of_part) in enumerate(zip(indices, np.split(ranks, np.cumsum(counts)[:-1]), strict=True)):
        offsets = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])
        places = offsets[np.searchsorted(of_part, edges)]
        for shard, (start, stop) in enumerate(zip(places[:-1].tolist(), places[1:].tolist(), strict=True)):
            if stop > start:
                ranges[shard].append((part, start, stop))
    return [
        ShardUnit(
            number=number,
            file=f"{split}-{number:05d}-of-{shards:05d}.parquet",
            first_id=number * shard_rows,
            rows=min(shard_rows, rows - number * shard_rows),
            block_rows=block_rows,
            ranges=tuple(ranges[number]),
            classes=classes,
            target=target,
            work=work,
        )
        for number in range(shards)
    ]
