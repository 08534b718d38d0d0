"""Benchmarks' arms in processes of their own: nothing that one leaves behind meets the next."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

LOOK_SECONDS = 0.005


def in_child(function: Callable[[], Any], meanwhile: Callable[[], object] | None = None) -> Any:
    """Call the function in a forked process, which has what is imported and loaded here; return its result.

    `meanwhile` is called here, again and again, until it is there.
    """
    context = get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=lambda: there.send(function()))
    process.start()
    there.close()
    try:
        while meanwhile is not None and not here.poll(LOOK_SECONDS):
            meanwhile()
        return here.recv()
    except EOFError:
        raise SystemExit("an arm ended without a result; its error is above") from None
    finally:
        process.join()
        process.close()
        here.close()


def tree(root: int) -> list[int]:
    """The process and all below it, as Linux lists them."""
    found = [root]
    for pid in found:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                found += map(int, children.read_text().split())
    return found
