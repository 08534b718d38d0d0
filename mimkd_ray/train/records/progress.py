"""Progress of training for people: lines of the first worker, images/s and time left, figures in words."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from mimkd_ray import console
from mimkd_ray.train.distributed import Context

WARM_STEPS = 5
"""Steps that images/s leave out: allocation, autotuning, compilation."""


def say(context: Context, text: str) -> None:
    """Print one line, from the first worker only."""
    if context.rank == 0:
        console.line(text)


def reading(nats: float | None, ceiling: float | None, digits: int = 2) -> str:
    """Return a term's nats as text: of at most InfoNCE's ceiling, or an estimate. The other bounds have no ceiling
    (infinite, or None as JSON has it), and DV, JSD and SMILE read above the truth in small batches."""
    if nats is None or math.isnan(nats):
        return "no valid reading"
    if ceiling is None or math.isinf(ceiling):
        return f"{nats:.{digits}f} nats (estimate)"
    return f"{nats:.{digits}f} of at most {ceiling:.2f} nats"


def judged(held_out: Mapping[str, float], head_learns: bool = True) -> str:
    """Return the accuracy of held-out figures as text: by the head, if it learns, and where images lack labels by
    k-NN."""
    found = [
        f"{name} {held_out[key]:.2f} %"
        for key, name in (("top1", "top-1"), ("knn", "k-NN"))
        if not math.isnan(held_out.get(key, math.nan)) and (head_learns or key != "top1")
    ]
    return f"held-out {', '.join(found)}" if found else "nothing held out has a label"


class Progress:
    """The training that goes on, for the console: step, images/s and time left of the last minute, metrics.

    The text of the latest metrics is asked for only when it is shown: reading a number waits for the GPU.
    """

    def __init__(self, context: Context, label: str, start: int, total: int, batch: int) -> None:
        self.label, self.total, self.batch = label, total, batch
        self.shown = context.rank == 0
        self.speed = console.LastMinute(start)
        self.next_text = time.monotonic() + console.current().every
        if self.shown:
            console.show(console.Status(label, start, total))

    def update(self, step: int, text: Callable[[], str]) -> None:
        """Tell that ``step`` steps are done; ``text()`` is the latest metrics."""
        now, steps = time.monotonic(), self.speed.rate(step)
        if self.shown and (now >= self.next_text or step == self.total):
            self.next_text = now + console.current().every
            left = (self.total - step) / max(steps, 1e-9)
            console.show(console.Status(self.label, step, self.total, "steps", steps * self.batch, left, text()))

    def close(self) -> None:
        """It is over."""
        if self.shown:
            console.show(None)


class Meter:
    """Images per second of training alone: without the first steps, evaluations and checkpoints."""

    def __init__(self, device: torch.device, batch: int) -> None:
        self.device, self.batch = device, batch
        self.steps = 0
        self.began = time.perf_counter()
        self.idle = 0.0
        self.warm_seconds = 0.0

    def elapsed(self) -> float:
        """Seconds of training so far."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.began - self.idle

    def step(self) -> None:
        """Count a step."""
        self.steps += 1
        if self.steps == WARM_STEPS:
            self.warm_seconds = self.elapsed()

    def rate(self) -> float:
        """Images of all workers per second."""
        if self.steps <= WARM_STEPS:
            return self.steps * self.batch / max(self.elapsed(), 1e-9)
        return (self.steps - WARM_STEPS) * self.batch / max(self.elapsed() - self.warm_seconds, 1e-9)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A with-block whose time does not count."""
        began = time.perf_counter()
        yield
        self.idle += time.perf_counter() - began
