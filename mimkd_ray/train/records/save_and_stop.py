"""Decisions to save and to stop, agreed by all workers: a checkpoint is a joint act, and clocks and signals differ."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

from mimkd_ray.config import RunConfig
from mimkd_ray.train.distributed import Context, Preemption, all_max

AGREE_SECONDS = 1.0
"""Workers agree about this often: a stop or a notice is acted upon within a step or about this time."""

NOTICE_SECONDS = 3.0
"""The launcher is asked for notices about this often: it may take a while to answer."""

AGREE_STEPS = 50
"""And at least every so many steps."""


class Decision(NamedTuple):
    """A decision after a step."""

    save: bool
    stop: bool
    notice: Preemption | None  #: machines that are about to be taken away, when they are heard of for the first time


@dataclass
class Rhythm:
    """Decides after every step. All workers make one, with equal arguments, and ask it after the same steps."""

    config: RunConfig
    context: Context
    steps_per_epoch: int
    start: int

    def __post_init__(self) -> None:
        self._next = self._last = self.start
        self._looked = self._saved = self._asked = time.monotonic()
        self._known: tuple[str, ...] = ()  # nodes of the last notice: a deadline that moves is no news

    def after(self, done: int, save: bool = False) -> Decision:
        """Return what to do after ``done`` steps; with ``save``, save in any case. Takes about 0.1 ms where workers
        agree, nothing elsewhere."""
        config = self.config
        epoch, rest = divmod(done, self.steps_per_epoch)
        save |= bool(config.checkpoint_steps) and done % config.checkpoint_steps == 0
        save |= rest == 0 and bool(config.checkpoint_every) and epoch % config.checkpoint_every == 0
        stop, notice = False, None
        if done >= self._next:
            stop, due, ask = self._agree(done)
            found = self.context.preemption() if ask else None
            if found is not None and found.nodes != self._known:
                notice, self._known = found, found.nodes
            save |= stop or due or notice is not None
        if save:
            self._saved = time.monotonic()
        return Decision(save, stop, notice)

    def _agree(self, done: int) -> tuple[bool, bool, bool]:
        """Return whether anybody is asked to stop; whether, by the first worker's clock, a checkpoint is due and the
        launcher should be asked for notices; and when to agree again, by its clock too."""
        now = time.monotonic()
        gap = due = ask = 0
        if self.context.rank == 0:
            seconds = (now - self._looked) / max(1, done - self._last)
            gap = max(1, min(AGREE_STEPS, int(AGREE_SECONDS / max(seconds, 1e-6))))
            minutes = self.config.checkpoint_minutes
            due = int(minutes > 0 and now - self._saved >= 60 * minutes)
            ask = int(now - self._asked >= NOTICE_SECONDS)
        stop, due, ask, gap = all_max([int(self.context.stop_requested()), due, ask, gap])
        self._looked, self._last, self._next = now, done, done + gap
        if ask:
            self._asked = now
        return bool(stop), bool(due), bool(ask)
