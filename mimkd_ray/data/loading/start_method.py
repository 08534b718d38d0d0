"""The start method of helper processes (loader processes, read-ahead)."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.context import BaseContext


def helper_context() -> BaseContext:
    """Return the multiprocessing context of helper processes: fork on Linux, else the program's default.

    The method is set explicitly because the default changes with Python 3.14 (to forkserver) and can be set by the
    program. Helper processes start anew for every evaluation: forked ones take milliseconds, others import torch again,
    which takes seconds. Forked ones also see the memory in which finished batches are returned (shared_memory.py). They
    are started before the loader's own threads and never use an accelerator. On other systems fork is unsafe or
    missing.
    """
    return multiprocessing.get_context("fork" if sys.platform == "linux" else None)
