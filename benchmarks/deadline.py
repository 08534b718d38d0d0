"""A plain process that asks itself to stop at a time."""

from __future__ import annotations

import time

import torch

from mimkd_ray.cli.local_launch import LocalContext


class Deadline(LocalContext):
    """A plain process that asks itself to stop at a time."""

    def __init__(self, device: torch.device, at: float) -> None:
        """Set the time of the stop: ``at`` on the clock of :func:`time.monotonic`, or infinity."""
        super().__init__(device)
        self.at = at

    def stop_requested(self) -> bool:
        """Return whether SIGTERM was received or the time is over."""
        return super().stop_requested() or time.monotonic() > self.at
