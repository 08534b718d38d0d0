"""The precision in which losses compute."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32; float64 is kept, so that runs can be compared in double precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
