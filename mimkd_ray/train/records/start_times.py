"""When this start of the job reached its first step, and by which stages: Unix times, so that processes compare."""

from __future__ import annotations

import time
from collections.abc import Mapping

_marks: dict[str, float] = {}


def mark(stage: str) -> None:
    """Note that ``stage`` is over. Only the first time counts: a comparison trains many students."""
    _marks.setdefault(stage, time.time())


def begin(earlier: Mapping[str, float] | None = None) -> None:
    """Forget earlier starts in this process, and take over the marks of the process that launched this one."""
    _marks.clear()
    _marks.update(earlier or {})


def marks() -> dict[str, float]:
    """The stages so far, as result.json shows them: parsed, checked, connected, worker (of a search's trial: asked),
    data, teacher, cache, built, first_batch, first_step. A teacher that is trained first has the first step."""
    return dict(_marks)
