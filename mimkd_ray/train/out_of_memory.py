"""Errors that say that memory ran out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

import torch

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

WORDS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
"""What allocators say, in lower case; on a CPU, PyTorch raises a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error).lower() for words in WORDS)


def each(keys: Iterable[K], act: Callable[[K], V], failed: dict[K, str] | None) -> dict[K, V]:
    """Return what ``act`` gives for each key, leaving out keys that are in ``failed``.

    A key that finds no memory is added to ``failed`` with what the allocator said; None: its error is raised.
    """
    done = {}
    for key in keys:
        if failed is not None and key in failed:
            continue
        try:
            done[key] = act(key)
        except Exception as error:
            if failed is None or not is_out_of_memory(error):
                raise
            # The text alone: the error's traceback holds what had been allocated.
            failed[key] = str(error) or type(error).__name__
    return done
