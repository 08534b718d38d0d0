"""A student in training: its networks, optimiser and statistics, its evaluation, and its state for a restart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mimkd_ray import storage
from mimkd_ray.config import Config
from mimkd_ray.config.digest import changes, refuse_changes, training_dict
from mimkd_ray.data.sources.data_set import Data
from mimkd_ray.errors import UserError
from mimkd_ray.json_files import read_if_sound
from mimkd_ray.losses.features import Features
from mimkd_ray.models.head import head_of
from mimkd_ray.models.modes import in_mode
from mimkd_ray.taps.tapped_model import TappedModel
from mimkd_ray.train.distributed import Context, ask_first, gather_by_rank, is_distributed
from mimkd_ray.train.engine.gradients import SummedGradients
from mimkd_ray.train.engine.inputs import Inputs
from mimkd_ray.train.engine.step import StepRecord, optimisation_step, seed_lane
from mimkd_ray.train.from_cache.cached_teacher import open_cached
from mimkd_ray.train.held_out.evaluate import Accuracy, accuracies, held_out_name, read_information
from mimkd_ray.train.held_out.neighbours import knn_top1
from mimkd_ray.train.held_out.recorded import logits_of
from mimkd_ray.train.networks.build import PlannedStudent, build_distiller, has_compiler, plan_student, why_plain
from mimkd_ray.train.networks.optim import (
    build_optimizer,
    learning_rate,
    load_portable,
    portable_state,
    set_learning_rate,
)
from mimkd_ray.train.networks.student_module import LaneNorms, StudentModule, data_parallel
from mimkd_ray.train.networks.teacher_head import teacher_head, trains_head
from mimkd_ray.train.out_of_memory import each
from mimkd_ray.train.records import checkpoint
from mimkd_ray.train.records.metrics import say
from mimkd_ray.train.records.outcomes import RESULT

COMPILE_FROM_STEPS = 10_000
"""Steps of a run from which compilation pays by default. On an H200 it took 43 s and made captured steps of ResNet-34
-> ResNet-18 at 224 px, batch 256, 1.4 times as fast: 9 ms less a step (benchmarks/gpu_step.py)."""


class Student:
    """One student in one worker: ``step()`` advances it, ``evaluate()`` looks at it, ``save()`` is for a restart.

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
        self.ema = (
            AveragedModel(self.distiller.student, multi_avg_fn=get_ema_multi_avg_fn(train.ema_decay))
            if train.ema_decay
            else None
        )
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
        if self.ema is not None:
            self.ema.update_parameters(self.distiller.student)

    def step(self, step: int) -> StepRecord:
        """Take one step alone, as PlainEngine does (train/engine/captured.py)."""
        self.schedule(step)
        seed = partial(seed_lane, self.config.train.seed, step)
        record = optimisation_step([self], self.inputs.step(step), seed)[self]
        self.follow()
        return record

    @contextmanager
    def settled(self) -> Iterator[None]:
        """A with-block in which batch-norm statistics are those of all workers. Every worker enters it."""
        with self.norms.averaged():
            self._ema_follows()
            yield
        self._ema_follows()

    def _ema_follows(self) -> None:
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

    def evaluate(self) -> dict[str, Any]:
        """Held-out top-1, top-5, cross-entropy, and mutual information per term. Training goes on as if nobody had
        looked."""
        return evaluate_together([self])[self]

    def save(self, step: int, writer: checkpoint.Writer | None) -> None:
        """Checkpoint after ``step`` steps. Every worker takes part; the first has the writer."""
        own_statistics = gather_by_rank(self.norms.flat().cpu())
        with self.settled():
            if writer is not None:
                writer.save(step, self.state(step, own_statistics))

    def state(self, step: int, own_statistics: list[Tensor]) -> dict[str, Any]:
        """Everything a restart needs. The order, the views and the model's random numbers follow from the step.

        Batch-norm statistics are in it twice: averaged over workers, for any number of them, and each worker's own,
        with which the same number of workers goes on bit for bit.
        """
        return {
            "step": step,
            "config": training_dict(self.config),
            "data": self.data.digest,
            "distiller": self.distiller.state_dict(),
            "optimizer": portable_state(self.optimizer),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "own_statistics": own_statistics,
        }

    def resume(self, run_dir: str) -> int:
        """Load the newest checkpoint of the run, if any. Returns the step to go on from (0 at the start)."""
        content = _newest(run_dir)
        if content is not None:
            return self.restore(run_dir, content)
        if self.config.run.start_from:
            self.start_from(self.config.run.start_from)
        return 0

    def start_from(self, run_dir: str) -> None:
        """Begin with what another run ended with: the weights that it exports (its student's, or their moving average),
        and the critics', the queue and the optimiser's state of its newest checkpoint. Raises UserError if they do not
        fit."""
        content = _newest(run_dir)
        file = storage.join(run_dir, "student.safetensors")
        weights, result = ask_first(lambda: (storage.exists(file), read_if_sound(storage.join(run_dir, RESULT)) or {}))
        if content is None and not weights:
            raise UserError(f"run.start_from {run_dir} has neither checkpoint nor result: name a run that reached one")
        if content is None:
            say(self.context, f"{run_dir} has no checkpoint: critics and optimiser start anew")
        try:
            if content is not None:
                state = checkpoint.parse(content, self.context.device)
                self.distiller.load_state_dict(state["distiller"])
                load_portable(self.optimizer, state["optimizer"], own_settings=True)
                # A run that was given more steps after its end has the weights of that end until the next one.
                weights = weights and result.get("steps", state["step"]) >= state["step"]
            exported = load_safetensors(storage.read_bytes(file)) if weights else checkpoint.student_of(state)
            self.distiller.student.model.load_state_dict(exported)
        except (RuntimeError, KeyError, ValueError) as error:
            told = " ".join(str(error).split())[:300]
            raise UserError(
                f"run.start_from {run_dir} does not fit this configuration: {told}; networks, terms, layers and the "
                "optimiser must be the same"
            ) from error
        if self.ema is not None:
            self.ema.module.load_state_dict(self.distiller.student.state_dict())

    def restore(self, run_dir: str, content: bytes) -> int:
        """Take over the state in a checkpoint of the run. Returns the step to go on from."""
        state = checkpoint.parse(content, self.context.device)
        changed = changes(state["config"], self.config)
        if state["data"] != self.data.digest:
            changed.append(f"the data set's digest: {state['data'][:12]} -> {self.data.digest[:12]}")
        refuse_changes(run_dir, changed)
        self.distiller.load_state_dict(state["distiller"])
        load_portable(self.optimizer, state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if len(state["own_statistics"]) == self.context.world_size:
            self.norms.load(state["own_statistics"][self.context.rank])
            self._ema_follows()
        return int(state["step"])


def _newest(run_dir: str) -> bytes | None:
    """Return the content of a run's newest checkpoint; None without one. The first worker chooses: a straggler of an
    earlier start may commit another one meanwhile. Every worker calls it."""
    found: list[bytes] = []

    def look() -> str | None:
        newest = checkpoint.newest(run_dir)
        if newest is not None:
            found.append(newest[1])
        return newest and newest[0]

    folder = ask_first(look)
    return None if folder is None else found[0] if found else checkpoint.read(folder)


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


def evaluate_together(
    students: Sequence[Student], failed: dict[Student, str] | None = None
) -> dict[Student, dict[str, Any]]:
    """:meth:`Student.evaluate` of students with the same inputs: images are decoded and the teacher runs once.

    A student that finds no memory is added to ``failed`` with what the allocator said, and has no figures; None: its
    error is raised.
    """
    inputs = students[0].inputs
    train, images = inputs.config.train, inputs.config.data
    with ExitStack() as stack:
        for student in students:
            stack.enter_context(student.settled())
        # With their taps: the network alone would leave those of its last batch in the hooks that are on it.
        networks = {student: student.tapped() for student in students}
        recorded = inputs.forwards
        logits = {
            student: partial(logits_of, network) if recorded is None else recorded.of(network)
            for student, network in networks.items()
        }
        measured = {student: Accuracy(math.nan, math.nan, math.nan, inputs.data.val.num_rows, 0) for student in logits}
        if inputs.data.judged:
            batches = inputs.held_out(inputs.eval_batch)
            with in_mode(False, *networks.values()):
                measured = accuracies(
                    logits, batches, inputs.normalize, images.max_damaged, held_out_name(images), failed=failed
                )
        values: dict[Student, dict[str, Any]] = {student: found._asdict() for student, found in measured.items()}

        def look_around(student: Student) -> None:
            if student.vector is not None:
                knn = knn_top1(student.exported(), student.vector, student.config, inputs.data, inputs.normalize)
                values[student]["knn"] = math.nan if knn is None else knn

        each(values, look_around, failed)
        readable = {student: student.distiller for student in values if student.distiller.loss.plan}
        if inputs.teacher is not None and readable and train.information_rows:
            # In batches of a lane, so that held-out nats have the ceiling of those in training.
            rows = train.information_rows
            lanes = inputs.held_out(train.lane_batch, "mutual information on held-out images", rows)
            read = read_information(readable, inputs.teacher, lanes, inputs.normalize, rows, failed)
            for student, information in read.items():
                values[student] |= information
    return {student: found for student, found in values.items() if student not in (failed or {})}
