"""Benchmarks' arms in processes of their own: nothing that one leaves behind meets the next."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from typing import Any


def in_child(function: Callable[[], Any]) -> Any:
    """Call the function in a forked process, which has what is imported and loaded here; return its result."""
    context = get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=lambda: there.send(function()))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise SystemExit("an arm ended without a result; its error is above") from None
    finally:
        process.join()
        process.close()
        here.close()
