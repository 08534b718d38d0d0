"""A queue of teacher vectors of earlier steps, as negatives for the terms that read them.

A bound such as InfoNCE reads at most ln(candidates): 4.2 nats in a lane of 64, 9.7 with 16,384 vectors beside it. The
queue keeps what the teacher said, not embeddings of it, so nothing in it grows stale while a critic learns. What it
holds follows from the step alone: the vectors of all lanes of the steps before, in the order of lanes, whoever carried
them. Vectors are kept in half precision, with their images' ids and class numbers, and are part of every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mimkd_ray.errors import UserError

MOST_BYTES = 64 * 2**20
"""Size up to which a queue is kept, as it is in every checkpoint: 16,384 vectors of 2,048 channels."""

HALF_MAX = 65_504.0
"""Largest number in half precision."""

NO_LABEL = -1
"""Class of an image whose class is not known, or which is mixed of several."""


class TeacherQueue(nn.Module):
    """The newest ``size`` teacher vectors of each tap: a ring, written by :meth:`push`, read whole.

    Memory: 2 * size * (sum of the taps' channels) bytes.
    """

    ids_Q: Tensor
    labels_Q: Tensor
    pushed: Tensor

    def __init__(self, size: int, channels: Mapping[str, int]) -> None:
        """``channels`` of the vectors by tap. Raises UserError for a queue of more than 64 MiB."""
        super().__init__()
        check_size(size, channels)
        self.size = size
        self.buffer_of = {tap: f"vectors{number}" for number, tap in enumerate(channels)}
        for tap, count in channels.items():
            # Bytes, so that moving the loss to another float type leaves them alone, and NCCL takes them.
            self.register_buffer(self.buffer_of[tap], torch.zeros(size, 2 * count, dtype=torch.uint8))
        self.register_buffer("ids_Q", torch.full((size,), -1))
        self.register_buffer("labels_Q", torch.full((size,), NO_LABEL))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    def vectors(self, tap: str, count: int | None = None) -> Tensor:
        """The vectors of a tap (Q, C) in half precision; only those of ``filled_Q`` mean something. ``count``: of the
        first so many places, which are renewed as the others are."""
        return self.get_buffer(self.buffer_of[tap])[:count].view(torch.float16)

    @property
    def filled_Q(self) -> Tensor:
        """Which places hold a vector."""
        return torch.arange(self.size, device=self.pushed.device) < self.pushed

    @torch.no_grad()
    def push(self, vectors: Mapping[str, Tensor], ids_N: Tensor, labels_N: Tensor) -> None:
        """Put vectors (N, C) by tap in the places of the oldest. The last ``size`` of them, if they are more."""
        dropped = max(0, len(ids_N) - self.size)
        places_N = (self.pushed + torch.arange(dropped, len(ids_N), device=ids_N.device)) % self.size
        for tap, value_NC in vectors.items():
            half_NC = value_NC[dropped:].clamp(-HALF_MAX, HALF_MAX).half().contiguous()
            self.get_buffer(self.buffer_of[tap]).index_copy_(0, places_N, half_NC.view(torch.uint8))
        self.ids_Q.index_copy_(0, places_N, ids_N[dropped:])
        self.labels_Q.index_copy_(0, places_N, labels_N[dropped:])
        self.pushed += len(ids_N)


def check_size(size: int, channels: Mapping[str, int]) -> None:
    """Raise UserError for a queue of so many vectors that its size is more than 64 MiB. ``channels`` by tap."""
    row_bytes = 2 * sum(channels.values())
    if size * row_bytes > MOST_BYTES:
        raise UserError(
            f"loss.queue is {size} and the vectors have {' + '.join(map(str, channels.values()))} channels: "
            f"{size * row_bytes / 2**20:.0f} MiB, which every checkpoint would hold; pass --loss.queue "
            f"{MOST_BYTES // row_bytes} or less (64 MiB)"
        )
