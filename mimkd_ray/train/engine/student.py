"""A student in training: its networks, optimiser and statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mimkd_ray.config import Config
from mimkd_ray.data.sources.data_set import Data
from mimkd_ray.losses.features import Features
from mimkd_ray.models.head import head_of
from mimkd_ray.taps.tapped_model import TappedModel
from mimkd_ray.train.distributed import Context, is_distributed
from mimkd_ray.train.engine.gradients import SummedGradients
from mimkd_ray.train.engine.inputs import Inputs
from mimkd_ray.train.engine.step import StepRecord, optimisation_step, seed_lane
from mimkd_ray.train.from_cache.cached_teacher import open_cached
from mimkd_ray.train.networks.build import PlannedStudent, build_distiller, plan_student
from mimkd_ray.train.networks.device_settings import has_compiler, why_plain
from mimkd_ray.train.networks.optim import (
    build_optimizer,
    learning_rate,
    set_learning_rate,
)
from mimkd_ray.train.networks.student_module import LaneNorms, StudentModule, data_parallel
from mimkd_ray.train.networks.teacher_head import teacher_head, trains_head
from mimkd_ray.train.records.progress import say

COMPILE_FROM_STEPS = 10_000
"""Steps of a run from which compilation pays by default. On an H200 it took 43 s and made captured steps of ResNet-34
-> ResNet-18 at 224 px, batch 256, 1.4 times as fast: 9 ms less a step (benchmarks/gpu_step.py)."""


class Student:
    """One student in one worker: ``step()`` advances it; evaluation.py looks at it, restart.py saves and restores it.

    Its steps are given what they train on by :class:`Inputs`: its own, or that of a pack, whose students are advanced
    together.
    """

    def __init__(self, planned: PlannedStudent, inputs: Inputs) -> None:
        """``inputs`` were made for this student, perhaps among others."""
        config, context = planned.config, inputs.context
        self.config, self.inputs, self.data, self.context = config, inputs, inputs.data, context
        train, device = config.train, context.device
        self.plain_because = why_plain(config, device)
        self.order, self.total_steps, self.my_lanes = inputs.order, inputs.total_steps, inputs.my_lanes
        self.vector = planned.vector
        self.head_learns = trains_head(config, planned.shared)
        self.distiller = build_distiller(planned, self.data.train, device)
        self.average = get_ema_multi_avg_fn(train.ema_decay)
        self.ema = AveragedModel(self.distiller.student, multi_avg_fn=self.average) if train.ema_decay else None
        self.head_alone, self.body = False, _body(self.distiller, config.student.head_epochs, self.data.num_classes)
        self.optimizer = build_optimizer(config.optim, self.distiller, not self.plain_because)
        self.norms = LaneNorms(self.distiller, len(self.my_lanes), train.lanes)
        self.model: DistributedDataParallel | StudentModule = self.distiller
        self.summed: SummedGradients | None = None
        if is_distributed() and self.plain_because:
            self.model = data_parallel(self.distiller)
        elif is_distributed():
            self.summed = SummedGradients(self.distiller)
        self.compiled = False
        self._compile()

    def _compile(self) -> None:
        """Compile student, loss and teacher if the config asks for it, or if that pays: on a GPU in a long run. Every
        student of a pack is compiled by itself."""
        mode = self.config.train.compile
        long = self.total_steps >= COMPILE_FROM_STEPS * self.inputs.students
        pays = self.context.device.type == "cuda" and long
        if mode == "off" or (mode == "auto" and not pays):
            return
        if not has_compiler():
            say(self.context, "compilation is off: no C++ compiler (c++, g++ or clang++) was found")
            return
        self.compiled = True
        self.distiller.compile()
        if self.inputs.teacher is not None:
            self.inputs.teacher.tapped.compile()

    def schedule(self, step: int) -> None:
        """Set what follows from the step's number: the learning rate and the loss's weights."""
        epoch = step / self.order.steps_per_epoch
        self.head_alone = epoch < self.config.student.head_epochs
        self.distiller.loss.begin_step(epoch, epoch / self.config.train.epochs)
        lr = learning_rate(self.config.optim, step, self.order.steps_per_epoch, self.config.train.epochs)
        set_learning_rate(self.optimizer, lr)

    def sum_gradients(self) -> None:
        """Average the gradients of all workers, where DDP did not."""
        if self.summed is not None:
            self.summed.average()

    def go_plain(self) -> None:
        """Leave the gradients of several workers to DDP from now on: steps are not captured after all. Every worker
        calls it."""
        if self.summed is not None:
            self.summed, self.model = None, data_parallel(self.distiller, alike=False)

    def leave_alone(self) -> None:
        """Drop the gradients of all but the classifier, in the epochs in which that is trained alone: the optimiser
        then has no part in the rest, as if it were not there."""
        if self.head_alone:
            for parameter in self.body:
                parameter.grad = None

    def asks_for(self, features: Features | None) -> Features | None:
        """Of what the teacher says to all students of a pack, what this one asks for."""
        loss = self.config.loss
        if features is None or not loss.uses_teacher:
            return None
        return features if loss.resolved_negatives in ("step", "cache") else features._replace(others=None)

    def follow(self) -> None:
        """Let the moving average follow, after a step."""
        if self.ema is None:
            return
        if not self.ema.n_averaged:
            self.ema.update_parameters(self.distiller.student)
            return
        # As update_parameters does, which would wait for the step to bring the counter to the device, and copy
        # statistics, of which `settled` copies the newest.
        self.average(list(self.ema.parameters()), list(self.distiller.student.parameters()), self.ema.n_averaged)
        self.ema.n_averaged += 1

    def step(self, step: int) -> StepRecord:
        """Take one step alone, as PlainEngine does (train/engine/engines.py)."""
        self.schedule(step)
        seed = partial(seed_lane, self.config.train.seed, step)
        record = optimisation_step([self], self.inputs.step(step), seed)[self]
        self.follow()
        return record

    @contextmanager
    def settled(self) -> Iterator[None]:
        """A with-block in which batch-norm statistics are those of all workers. Every worker enters it."""
        with self.norms.averaged():
            self.ema_follows()
            yield
        self.ema_follows()

    def ema_follows(self) -> None:
        """The moving average has no statistics of its own: it shows the student's."""
        if self.ema is not None:
            for buffer, of_student in zip(self.ema.module.buffers(), self.distiller.student.buffers(), strict=True):
                buffer.copy_(of_student)

    def tapped(self) -> TappedModel:
        """The student, or its moving average, with its taps."""
        tapped = self.ema.module if self.ema is not None else self.distiller.student
        assert isinstance(tapped, TappedModel)
        return tapped

    def exported(self) -> torch.nn.Module:
        """The network that users get: the student, or its moving average."""
        return self.tapped().model

    def weights(self) -> dict[str, Tensor]:
        """Return the exported weights, on the CPU. Every worker calls it."""
        with self.settled():
            return {
                name: value.detach().to("cpu", copy=True).contiguous()
                for name, value in self.exported().state_dict().items()
            }


def _body(distiller: StudentModule, head_epochs: int, num_classes: int) -> list[torch.nn.Parameter]:
    """The student's parameters outside of its classifier; none where that is not trained first."""
    if not head_epochs:
        return []
    network = distiller.student.model
    head = set(network.get_submodule(head_of(network, num_classes)).parameters())
    return [parameter for parameter in network.parameters() if parameter not in head]


def lone_student(
    config: Config, data: Data, teacher: torch.nn.Module | None, context: Context, run_dir: str = ""
) -> Student:
    """Make the one student of a run, at its start: plan its taps, open its cache, tap the teacher.

    ``teacher`` is None where the loss needs none. ``run_dir`` keeps the numbers of codecs that are fitted without a
    cache; a config without codecs needs none. Every worker calls it.
    """
    planned = plan_student(config, teacher, data.num_classes, teacher_head(config, data).shared if teacher else None)
    cached = open_cached([planned], data, teacher, context, run_dir)
    context.times.mark("cache")
    inputs = Inputs([planned], data, teacher, context, cached)
    try:
        return Student(planned, inputs)
    except BaseException:
        inputs.close()  # the teacher may go on elsewhere
        raise
