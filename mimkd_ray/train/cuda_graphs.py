"""Work on a GPU as a CUDA graph: run without one first, then recorded. For steps (engine/engines.py) and for the
forward passes of evaluations (held_out/captured_forwards.py)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

WARM = 3
"""Times that work runs without a graph before it is recorded: libraries set themselves up meanwhile."""

T = TypeVar("T")


def run_warm(work: Callable[[], T], stream: torch.cuda.Stream) -> tuple[T, list[str]]:
    """Run work on the stream on which it will be recorded, after all that was asked for until now. Return what it
    returns, and each place where it waits for the device."""
    here = torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream), _waits_noted() as waits:
        done = work()
    here.wait_stream(stream)
    return done, waits


def record(work: Callable[[], T], stream: torch.cuda.Stream, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """Record work, which is not run by that. Return its graph and what it returns. ``pool``: the working memory, shared
    with graphs that are never replayed at the same time. Raises RuntimeError where that is impossible."""
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    wrong: RuntimeError | None = None
    try:
        # In the mode "global", which is the default, the thread that pins a loader's batches would end the recording
        # and fail itself, and with it the run.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                return graph, work()
            except RuntimeError as error:
                wrong = error
                raise
    except RuntimeError as error:
        wrong = wrong or error  # what ended the recording, and not that its end failed too
    torch.cuda.set_stream(here)
    try:
        raise wrong
    finally:
        wrong = None  # its traceback holds this frame: together they would keep what was allocated


@contextmanager
def _waits_noted() -> Iterator[list[str]]:
    """A with-block that yields a list, in which what waits for a CUDA device is noted: a graph cannot hold it, and a
    recording that fails may leave PyTorch in a state of which nothing is promised."""
    waits: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in warned:
        if "synchronizing CUDA operation" in str(warning.message):
            waits.append(f"{warning.filename}, line {warning.lineno}")
        elif "prototype feature" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
