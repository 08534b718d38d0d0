"""A queue of teacher vectors of earlier steps, as negatives for the terms that read them.

A bound such as InfoNCE gives at most ln(candidates): 4.2 nats in a lane of 64, 9.7 with 16,384 more vectors. The queue
keeps the teacher's vectors and not their embeddings, so its content does not become stale while a critic learns. The
content depends on the step alone: the vectors of all lanes of the previous steps, in the order of lanes, independent of
the workers. Vectors are kept in half precision, with their images' ids and class numbers, and are part of every
checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mimkd_ray.errors import UserError

MOST_BYTES = 64 * 2**20
"""Largest size of a queue, because every checkpoint contains it: 16,384 vectors of 2,048 channels."""

HALF_MAX = 65_504.0
"""Largest finite number in half precision."""

NO_LABEL = -1
"""Class of an image whose class is not known or which is a mix of several."""


def class_numbers(labels_B: Tensor, ids_B: Tensor) -> Tensor:
    """Return the class numbers of images (B,), for mixed images NO_LABEL."""
    return torch.full_like(ids_B, NO_LABEL) if labels_B.is_floating_point() else labels_B


class TeacherQueue(nn.Module):
    """A ring of the newest ``size`` teacher vectors of each tap, written by :meth:`push` and read as a whole.

    Checkpoints hold 2 * size * (sum of the taps' channels) bytes. The same numbers in single precision, which the loss
    reads, take twice as much memory beside them: to convert all of them in every step would cost more than their matrix
    product. A cast of the loss to another float type rounds these, and leaves the saved ones unchanged.
    """

    ids_Q: Tensor
    labels_Q: Tensor
    pushed: Tensor

    def __init__(self, size: int, channels: Mapping[str, int]) -> None:
        """Allocate the ring; ``channels`` of the vectors by tap. Raises UserError for a queue of more than 64 MiB."""
        super().__init__()
        check_size(size, channels)
        self.size = size
        self.buffer_of = {tap: f"vectors{number}" for number, tap in enumerate(channels)}
        for tap, count in channels.items():
            # Bytes, which a cast of the loss leaves unchanged, and NCCL accepts.
            self.register_buffer(self.buffer_of[tap], torch.zeros(size, 2 * count, dtype=torch.uint8))
            self.register_buffer(self._single(tap), torch.zeros(size, count), persistent=False)
        self.register_buffer("ids_Q", torch.full((size,), -1))
        self.register_buffer("labels_Q", torch.full((size,), NO_LABEL))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(_convert)

    def _single(self, tap: str) -> str:
        """The name of the buffer of a tap's vectors in single precision."""
        return f"single_{self.buffer_of[tap]}"

    def vectors(self, tap: str, count: int | None = None) -> Tensor:
        """Return the vectors of a tap (Q, C), rounded to half precision; only those of ``filled_Q`` are valid.
        ``count`` limits them to the first places, which are renewed as often as the others."""
        return self.get_buffer(self._single(tap))[:count]

    @property
    def filled_Q(self) -> Tensor:
        """Mask of the places that hold a vector."""
        return torch.arange(self.size, device=self.pushed.device) < self.pushed

    @torch.no_grad()
    def push(self, vectors: Mapping[str, Tensor], ids_N: Tensor, labels_N: Tensor) -> None:
        """Overwrite the oldest places with vectors (N, C) by tap; only with the last ``size``, if there are more."""
        dropped = max(0, len(ids_N) - self.size)
        places_N = (self.pushed + torch.arange(dropped, len(ids_N), device=ids_N.device)) % self.size
        for tap, value_NC in vectors.items():
            half_NC = value_NC[dropped:].clamp(-HALF_MAX, HALF_MAX).half().contiguous()
            self.get_buffer(self.buffer_of[tap]).index_copy_(0, places_N, half_NC.view(torch.uint8))
            single_QC = self.get_buffer(self._single(tap))
            single_QC.index_copy_(0, places_N, half_NC.to(single_QC.dtype))
        self.ids_Q.index_copy_(0, places_N, ids_N[dropped:])
        self.labels_Q.index_copy_(0, places_N, labels_N[dropped:])
        self.pushed += len(ids_N)


@torch.no_grad()
def _convert(queue: nn.Module, _: object) -> None:
    """Convert the vectors of a state that was loaded."""
    assert isinstance(queue, TeacherQueue)
    for tap, name in queue.buffer_of.items():
        queue.vectors(tap).copy_(queue.get_buffer(name).view(torch.float16))


def check_size(size: int, channels: Mapping[str, int]) -> None:
    """Raise UserError if a queue of ``size`` vectors is larger than 64 MiB. ``channels`` by tap."""
    row_bytes = 2 * sum(channels.values())
    if size * row_bytes > MOST_BYTES:
        raise UserError(
            f"loss.queue is {size} and the vectors have {' + '.join(map(str, channels.values()))} channels: "
            f"{size * row_bytes / 2**20:.0f} MiB, which every checkpoint would hold; pass --loss.queue "
            f"{MOST_BYTES // row_bytes} or less (64 MiB)"
        )
