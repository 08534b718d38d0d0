"""Engines that take the steps of training: operation by operation, or recorded once as a CUDA graph and replayed.

A small network's step is thousands of short GPU operations, and Python takes longer to ask for them than the GPU to do
them. The captured engine asks once: everything of a step that runs on the device (view, normalisation, teacher or
decoded cache, students, losses, backward passes, clipping, optimisers, batch-norm bookkeeping of lanes) is recorded as
a graph. What changes from step to step lies in tensors that the graph reads: the batch's images, labels, ids and cached
features, the key of the view, the numbers of a mix, the learning rate, the weights of the loss. Samples, views and
random numbers are those of the plain engine; arithmetic differs as far as cuDNN chooses other algorithms.

The first steps run without a graph, in the same buffers and on the same streams: libraries set themselves up in them.
The students of a pack work side by side, each on a stream of its own, after one teacher pass. On a CPU there are no
graphs, and the same code is called for every step; so it is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mimkd_ray.data.augment.batch_views import view_key
from mimkd_ray.data.augment.mixing import mix_numbers
from mimkd_ray.data.loading.batches import LaneBatch
from mimkd_ray.train.cuda_graphs import WARM, record, run_warm
from mimkd_ray.train.distributed import Context, first_said
from mimkd_ray.train.engine.inputs import Inputs
from mimkd_ray.train.engine.step import StepRecord, optimisation_step, seed_lane
from mimkd_ray.train.engine.student import Student
from mimkd_ray.train.records.progress import say

Taken = dict[Student, StepRecord]
Failed = dict[Student, str]


class Engine(Protocol):
    """Takes the steps of the students of a process."""

    def step(self, students: Sequence[Student], step: int, failed: Failed | None = None) -> Taken:
        """One optimiser step of every student, on the same lanes. One that finds no memory is added to ``failed`` with
        what the allocator said, and has no record; None, and once steps are recorded: its error is raised."""

    def close(self) -> None:
        """Take no more steps, and free what they needed."""


class PlainEngine:
    """Asks the device for one operation after the other."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def step(self, students: Sequence[Student], step: int, failed: Failed | None = None) -> Taken:
        """One optimiser step of every student, on the same lanes."""
        for student in students:
            student.schedule(step)
        seeds = partial(seed_lane, self.inputs.config.train.seed, step)
        taken = optimisation_step(students, self.inputs.step(step), seeds, failed)
        for student in taken:
            student.follow()
        return taken

    def close(self) -> None:
        """Nothing is held between steps."""


class _Recorded(NamedTuple):
    """A recorded step: the graph (None on a CPU), its students, the names of each one's figures, and the tensor in
    which the graph leaves them all."""

    graph: torch.cuda.CUDAGraph | None
    students: list[Student]
    names: list[list[str]]
    figures_M: Tensor | None

    def logs(self) -> dict[Student, dict[str, Tensor]]:
        """The figures of the newest replay."""
        assert self.figures_M is not None
        parts = self.figures_M.clone().split([len(names) for names in self.names])
        return {
            student: dict(zip(names, part.unbind(), strict=True))
            for student, names, part in zip(self.students, self.names, parts, strict=True)
        }


class CapturedEngine:
    """Records a step as a CUDA graph and replays it. Where that turns out to be impossible, goes on plainly and says
    why. Memory: the activations of all students of a pack at once."""

    def __init__(self, inputs: Inputs, context: Context) -> None:
        self.inputs, self.context = inputs, context
        self.plain = PlainEngine(inputs)
        self.gave_up = False
        self.recorded: _Recorded | None = None
        self.takes: list[tuple[Student, bool]] = []
        self.warm = 0
        self.buffers: list[LaneBatch] = []
        self.keys: list[Tensor] = []
        self.mixes: list[Tensor | None] = []
        self.on_gpu = context.device.type == "cuda"
        self.stream = torch.cuda.Stream(context.device) if self.on_gpu else None
        self.streams: list[torch.cuda.Stream] = []

    def step(self, students: Sequence[Student], step: int, failed: Failed | None = None) -> Taken:
        """One optimiser step of every student, on the same lanes."""
        if self.gave_up:
            return self.plain.step(students, step, failed)
        for student in students:
            student.schedule(step)
        takes = [(student, student.head_alone) for student in students]
        if takes != self.takes:  # a student has left, or its body has joined its classifier
            self._forget()
            self.takes, self.warm = takes, 0
        lanes = self.inputs.batches_of(step)
        self._load(step, lanes)
        beside = len(students) if self.on_gpu and len(students) > 1 else 0
        if len(self.streams) != beside:
            self.streams = [torch.cuda.Stream(self.context.device) for _ in range(beside)]
        if self.recorded is None and self.warm >= WARM:
            self._agree(students, step, self._record(students))
        if self.gave_up:
            taken = self._take(students, partial(seed_lane, self.inputs.config.train.seed, step), failed)
        elif self.recorded is None:
            taken, why = self._warm_step(students, step, failed)
            self._agree(students, step, why)
        else:
            taken = self._replay(self.recorded, step, failed)
        ids, view = [lane.ids_B for lane in lanes], lanes[-1].view  # the buffers' will be those of the next step
        for student, found in taken.items():
            student.follow()
            taken[student] = found._replace(ids=ids, view=view)
        return taken

    def _load(self, step: int, lanes: Sequence[LaneBatch]) -> None:
        """Copy a step's batches to where the graph reads them. The canary looks at those that are due."""
        if not self.buffers:
            self.buffers = [lane.each_tensor(torch.empty_like) for lane in lanes]
            self.keys = [torch.zeros((), dtype=torch.int64, device=self.context.device) for _ in lanes]
            own = torch.ones(6, dtype=torch.float64, device=self.context.device)
            self.mixes = [own.clone() if self.inputs.config.mix.active else None for _ in lanes]
        for buffer, key, mix, lane in zip(self.buffers, self.keys, self.mixes, lanes, strict=True):
            key.fill_(view_key(lane.view, self.inputs.config.view_seed))
            if mix is not None:
                mix.copy_(mix_numbers(self.inputs.mix_of(step, lane)), non_blocking=True)
            for place, value in zip(buffer.tensors(), lane.tensors(), strict=True):
                place.copy_(value, non_blocking=True)
            self.inputs.check_cached(step, lane)

    def _take(
        self, students: Sequence[Student], seeds: Callable[[int], None] | None, failed: Failed | None = None
    ) -> Taken:
        """A step from the buffers: what is recorded."""
        lanes = self.inputs.lanes_of(self.buffers, self.keys, self.mixes)
        return optimisation_step(students, lanes, seeds, failed, self.streams)

    def _warm_step(self, students: Sequence[Student], step: int, failed: Failed | None) -> tuple[Taken, str]:
        """A step without a graph, which shows why none could hold it, if so."""
        self.warm += 1
        seeds = _Seeds(self.inputs.config.train.seed, step, self.context.device)
        take = partial(self._take, students, seeds, failed)
        why = ""
        if self.stream is None:
            done = take()
        else:
            done, waits = run_warm(take, self.stream)
            if waits and self.warm == WARM:  # in the first steps libraries set themselves up
                why = f"a network or a loss waits for the device ({waits[0]})"
        drawn = seeds.drawn()
        if self.stream is not None and "cpu" in drawn and self.warm == WARM:
            why = "a network or a loss draws random numbers on the host, of which a graph repeats those of one step"
        elif len(students) * len(self.buffers) > 1 and self.context.device.type in drawn:
            why = "networks or losses draw random numbers, of which each lane and student has its own"
        return done, why

    def _record(self, students: Sequence[Student]) -> str:
        """Record a step, which is not run by that. Return why that is impossible, if so."""
        if self.stream is None:
            self.recorded = _Recorded(None, list(students), [], None)
            return ""
        try:
            graph, (names, figures_M) = record(partial(self._figures, students), self.stream)
        except RuntimeError as error:
            return str(error).partition("\n")[0] or type(error).__name__
        self.recorded = _Recorded(graph, list(students), names, figures_M)
        return ""

    def _figures(self, students: Sequence[Student]) -> tuple[list[list[str]], Tensor]:
        """Take a step, and return the names of each student's figures and all of these in one tensor."""
        logs = [found.log for found in self._take(students, None).values()]
        return [list(log) for log in logs], torch.stack([value for log in logs for value in log.values()])

    def _replay(self, recorded: _Recorded, step: int, failed: Failed | None) -> Taken:
        seed_lane(self.inputs.config.train.seed, step, self.inputs.my_lanes[0])
        if recorded.graph is None:
            return self._take(recorded.students, None, failed)
        recorded.graph.replay()
        return {student: StepRecord(log, [], 0) for student, log in recorded.logs().items()}

    def _agree(self, students: Sequence[Student], step: int, why: str) -> None:
        """Give up where any worker has a reason to: all take part in the same collectives."""
        why = first_said(why)
        if not why:
            return
        self._forget()
        self.gave_up = True
        self.streams = []
        for student in students:
            student.schedule(step)  # anew: the loss forgets the lanes of a recording
            student.go_plain()
        say(self.context, f"steps are not captured, and run operation by operation: {why}")

    def close(self) -> None:
        """Free the graph: a process group whose collectives are in one cannot be ended."""
        self._forget()

    def _forget(self) -> None:
        if self.recorded is not None and self.recorded.graph is not None:
            self.recorded.graph.reset()  # a replay under way comes to its end first
        self.recorded = None


class _Seeds:
    """Seeds the lanes of a step, and finds out from whose random numbers anything draws."""

    def __init__(self, seed: int, step: int, device: torch.device) -> None:
        self.seed, self.step, self.device = seed, step, device
        self.expected: dict[str, Tensor] = {}
        self.has_drawn: set[str] = set()

    def __call__(self, lane: int) -> None:
        self.drawn()
        seed_lane(self.seed, self.step, lane)
        self.expected = self._states()

    def drawn(self) -> set[str]:
        """Return the types of device on which anything has drawn until now."""
        now = self._states()
        self.has_drawn |= {kind for kind, state in self.expected.items() if not torch.equal(state, now[kind])}
        return self.has_drawn

    def _states(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        return states | {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else states


def make_engine(students: Sequence[Student]) -> Engine:
    """Return the engine of students with the same inputs; where it is plain and could be asked for otherwise, say
    why."""
    first = students[0]
    reasons = {student.plain_because for student in students} - {""}
    if not reasons:
        return CapturedEngine(first.inputs, first.context)
    engine, device = first.config.train.engine, first.context.device
    if engine == "captured" or (engine == "auto" and device.type == "cuda"):
        say(first.context, f"steps are not captured, and run operation by operation: {', '.join(sorted(reasons))}")
    return PlainEngine(first.inputs)
