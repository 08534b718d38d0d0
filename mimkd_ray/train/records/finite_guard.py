"""A stop of the run when a loss is NaN or infinite, before a checkpoint could hold what it did to the student."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mimkd_ray.errors import NonFiniteLossError


class FiniteGuard:
    """Stops the run when a loss is NaN or infinite, naming the step, the terms and the sample ids.

    On a GPU a step's loss is looked at one step later, when it is there without waiting; ``check_all`` looks at once
    and comes before every checkpoint, so none holds a broken student.
    """

    def __init__(self, device: torch.device) -> None:
        self.lag = 1 if device.type == "cuda" else 0
        self.pending: list[tuple[int, Mapping[str, Tensor], list[Tensor], Callable[[], float]]] = []

    def add(self, step: int, log: Mapping[str, Tensor], ids: list[Tensor]) -> None:
        """Take note of the breakdown and sample ids of step number ``step`` (from 1)."""
        self.pending.append((step, log, ids, read_later(log["loss"])))
        while len(self.pending) > self.lag:
            self._check(*self.pending.pop(0))

    def check_all(self) -> None:
        """Look at everything noted so far."""
        while self.pending:
            self._check(*self.pending.pop(0))

    @staticmethod
    def _check(step: int, log: Mapping[str, Tensor], ids: list[Tensor], loss: Callable[[], float]) -> None:
        if math.isfinite(loss()):
            return
        parts = {
            key: float(value)
            for key, value in log.items()
            if key in ("ce", "kd") or key.startswith("rival/") or key.endswith("/loss")
        }
        broken = [key for key, value in parts.items() if not torch.isfinite(torch.tensor(value))]
        sample = [i for lane in ids for i in lane.tolist()]
        raise NonFiniteLossError(
            f"the loss is {float(log['loss'])} at step {step}; not finite: {', '.join(broken) or 'only their sum'} "
            f"(of {', '.join(f'{key} {value:.4g}' for key, value in parts.items())}); sample ids "
            f"{', '.join(map(str, sample[:64]))}{' ...' if len(sample) > 64 else ''}: lower --optim.lr or the term's "
            "weight, or pass --optim.clip-norm 5; the last checkpoint is intact"
        )


def read_later(value: Tensor) -> Callable[[], float]:
    """Return a function that returns a scalar, once it is computed. A plain read waits for all that a GPU was asked for
    until then, the next step among it."""
    if not value.is_cuda:
        return value.item
    there, done = value.to("cpu", non_blocking=True), torch.cuda.Event()  # page-locked
    done.record(torch.cuda.current_stream(value.device))

    def read() -> float:
        done.synchronize()
        return there.item()

    return read
