"""How helper processes (loader processes, reading ahead) are started."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.context import BaseContext


def helper_context() -> BaseContext:
    """Return the context that helper processes are started with: fork on Linux, else the program's default.

    It is named here, because a program's default is another one from Python 3.14 on (forkserver), or where somebody set
    it. Helper processes are started anew for every evaluation: forked ones take milliseconds, others import torch
    again, which takes seconds. Forked ones also see the memory that finished batches travel in (shared_memory.py).
    They are started before the loader's own threads, and never use an accelerator. Elsewhere fork is not safe, or not
    there.
    """
    return multiprocessing.get_context("fork" if sys.platform == "linux" else None)
