"""What says that memory ran out."""

from __future__ import annotations

import torch

WORDS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
"""What allocators say, in lower case; on a CPU, PyTorch raises a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error).lower() for words in WORDS)
