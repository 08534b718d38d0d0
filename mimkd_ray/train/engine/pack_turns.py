"""The turns that a pack's students take in the parts of a step; one that finds no memory leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

import torch

from mimkd_ray.train.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from mimkd_ray.train.engine.student import Student


class Turns:
    """``for student in turns: with turns.of(student): ...`` does a part of a step for every student that is left.

    A student that finds no memory in its turn gives up its gradients and is left out of the turns that follow.
    """

    def __init__(
        self,
        students: Sequence[Student],
        failed: dict[Student, str] | None = None,
        streams: Sequence[torch.cuda.Stream] = (),
    ) -> None:
        """``failed``: takes a student that finds no memory, with what the allocator said; None: its error is raised.
        ``streams``: one a student, on which it works beside the others; none: one works after the other."""
        self.students, self.failed = students, failed
        self.streams = dict(zip(students, streams, strict=True)) if streams else {}
        self.forked: dict[torch.cuda.Stream, None] = {}

    def __iter__(self) -> Iterator[Student]:
        """Go through the students that are left. What is asked for after the last one's turn waits for all streams."""
        for student in self.students:
            if not self.failed or student not in self.failed:
                yield student
        self._join()

    def _join(self) -> None:
        for stream in self.forked:
            torch.cuda.current_stream().wait_stream(stream)

    @contextmanager
    def of(self, student: Student) -> Iterator[None]:
        """A with-block that is a student's turn."""
        try:
            if self.streams:
                self.forked[self.streams[student]] = None
            with _forked(self.streams[student]) if self.streams else nullcontext():
                yield
        except Exception as error:
            with suppress(RuntimeError):  # of a recording that has ended: one with loose streams gives no memory back
                self._join()
            if self.failed is None or not is_out_of_memory(error):
                raise
            # The text alone: the error's traceback holds what had been allocated.
            self.failed[student] = str(error) or type(error).__name__
        if self.failed and student in self.failed:
            student.optimizer.zero_grad(set_to_none=True)  # the next one may need the room


@contextmanager
def _forked(stream: torch.cuda.Stream) -> Iterator[None]:
    """A with-block whose GPU work runs on ``stream``, after all that was asked for until now."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
