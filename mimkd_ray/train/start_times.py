"""The stages of a start of the job up to its first step: Unix times, so that processes compare."""

from __future__ import annotations

import time
from collections.abc import Mapping


class StartTimes:
    """The stages of one start, kept by the context that the job runs in."""

    def __init__(self, earlier: Mapping[str, float] | None = None) -> None:
        """``earlier``: the marks of the process that launched this one."""
        self._marks = dict(earlier or {})

    def mark(self, stage: str) -> None:
        """Note that ``stage`` is over. Only the first time counts: a comparison trains many students."""
        self._marks.setdefault(stage, time.time())

    def marks(self) -> dict[str, float]:
        """The stages so far, as result.json shows them: parsed, checked, connected, worker (of a search's trial:
        asked), data, teacher, cache, built, first_batch, first_step. A teacher that is trained first has the first
        step."""
        return dict(self._marks)
