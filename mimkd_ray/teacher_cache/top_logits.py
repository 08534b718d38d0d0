"""The K largest logits of a row and the mass of all others: a small form of the teacher's output.

    logits (B, C)  ->  K largest as fp16 | log of the others' mean exponential as fp16 | K class numbers

A row takes 4 K + 2 bytes (6 K + 2 beyond 65,536 classes), whereas all logits as fp16 take 2 C: for 1,000 classes 130
instead of 2,000 with K = 32. It is decoded to all C logits, in which every class that was not kept has an equal share
of the others' mass: the number in the middle, their log-sum-exp less log(C - K), is the logit of each. It is therefore
no larger than they were, and loses no more by rounding than a logit does.

softmax at temperature 1 is exact, up to rounding, for each of the K classes and for the mass of the others together.
The distribution of that mass over the others is not exact, and therefore no other temperature is: for T > 1 equal
logits have more mass than unequal ones of the same sum, so the K classes become too small, more so for fewer classes
and a higher T.

The reduction belongs to a run, cached or live, like pooling and components (`apply`); cached logits differ from live
ones only by rounding.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

_FLOAT = torch.float16


class TopLogits:
    """The codec of the logits of `classes` classes, of which `kept` are stored; 0 < kept < classes. On any device."""

    def __init__(self, kept: int, classes: int) -> None:
        assert 0 < kept < classes, f"{kept} of {classes} classes"
        self.kept, self.classes = kept, classes
        self.number = torch.uint16 if classes <= 2**16 else torch.uint32
        self.head_bytes = (kept + 1) * _FLOAT.itemsize
        self.row_bytes = self.head_bytes + kept * self.number.itemsize

    def apply(self, logits_BC: Tensor) -> Tensor:
        """Share the mass of the classes that are not kept evenly among them: (B, C) -> (B, C), float32 (float64 is
        kept).

        Applying it twice changes nothing more. Time O(B C log K).
        """
        return self._full(*self._split(logits_BC))

    def pack(self, logits_BC: Tensor) -> Tensor:
        """Return the rows (B, row_bytes), uint8, of the output of `apply`."""
        head_BK, share_B1, numbers_BK = self._split(logits_BC)
        floats_BK1 = torch.cat([head_BK, share_B1], dim=1).to(_FLOAT)
        return torch.cat([floats_BK1.view(torch.uint8), numbers_BK.to(self.number).view(torch.uint8)], dim=1)

    def decode(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return logits (B, C) from rows (B, row_bytes)."""
        # Copied separately: a view of another type must start at a multiple of that type's size.
        floats_BK1 = rows[:, : self.head_bytes].contiguous().view(_FLOAT).to(dtype)
        numbers_BK = rows[:, self.head_bytes :].contiguous().view(self.number).long()
        return self._full(floats_BK1[:, :-1], floats_BK1[:, -1:], numbers_BK)

    def _split(self, logits_BC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the K largest logits, the logit that each of the others gets (B, 1), and the numbers of the K
        classes."""
        logits_BC = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
        head_BK, numbers_BK = logits_BC.topk(self.kept, dim=1)
        rest_B1 = logits_BC.scatter(1, numbers_BK, -torch.inf).logsumexp(1, keepdim=True)
        return head_BK, rest_B1 - log(self.classes - self.kept), numbers_BK

    def _full(self, head_BK: Tensor, share_B1: Tensor, numbers_BK: Tensor) -> Tensor:
        return share_B1.repeat(1, self.classes).scatter_(1, numbers_BK, head_BK)
