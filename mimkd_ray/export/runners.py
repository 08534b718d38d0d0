"""What runs a file: a function of images to logits; the student itself is one."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
from torch import Tensor

Runner = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W), float32, as the network takes them -> logits (B, classes)."""

BATCHES = (1, 32)
"""Batch sizes that are timed."""


def logits_of_all(run: Runner, batches: Iterable[Tensor]) -> Tensor:
    """Return the logits (N, classes) of all batches."""
    with torch.inference_mode():
        return torch.cat([run(images).float() for images in batches])


def latency_ms(run: Runner, images_BCHW: Tensor, threads: int, seconds: float = 0.3) -> dict[str, float]:
    """Return the median milliseconds of a call at each of BATCHES, by batch size."""
    with quiet():  # it looks for CUDA on import, and says so
        from torch.utils.benchmark import Timer
    found = {}
    for batch in BATCHES:
        # With less images than that, they come again.
        some = images_BCHW[torch.arange(batch) % len(images_BCHW)].contiguous()
        timer = Timer("run(some)", globals={"run": torch.inference_mode()(run), "some": some}, num_threads=threads)
        found[str(batch)] = 1000 * float(timer.blocked_autorange(min_run_time=seconds).median)
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Show nothing of what exporters say of their own parts during a with-block; errors are raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        said = io.StringIO()
        with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
