"""Arms of benchmarks in separate processes, so that nothing that one leaves behind affects the next."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

LOOK_SECONDS = 0.005


def in_child(function: Callable[[], Any], meanwhile: Callable[[], object] | None = None) -> Any:
    """Call the function in a forked process, which has everything imported and loaded here; return its result.

    `meanwhile` is called here repeatedly until the result is there.
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
    """Return the process and all its descendants, as Linux lists them."""
    found = [root]
    for pid in found:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                found += map(int, children.read_text().split())
    return found
