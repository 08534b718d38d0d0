"""One optimisation step of a student, or of the students of a pack, from zeroed gradients to the loss's bookkeeping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mimkd_ray.losses.features import Features
from mimkd_ray.seeds import derive
from mimkd_ray.train.distributed import gather_lanes
from mimkd_ray.train.engine.inputs import Lane
from mimkd_ray.train.engine.pack_turns import Turns
from mimkd_ray.train.networks.student_module import StudentModule

if TYPE_CHECKING:
    from mimkd_ray.train.engine.student import Student


class StepRecord(NamedTuple):
    """The figures of a step: the mean breakdown of this worker's lanes, their sample ids, and the view."""

    log: dict[str, Tensor]
    ids: list[Tensor]
    view: int


def optimisation_step(
    students: Sequence[Student],
    lanes: Iterable[Lane],
    seed: Callable[[int], None] | None,
    failed: dict[Student, str] | None = None,
    streams: Sequence[torch.cuda.Stream] = (),
) -> dict[Student, StepRecord]:
    """One optimisation step of every student, on the same lanes, from zeroed gradients to the loss's bookkeeping.

    Before it, :meth:`Student.schedule` has set the step's learning rate and weights; after it, :meth:`Student.follow`
    moves the average. Everything between them runs on the device, so that it can be recorded (engines.py).

    ``seed`` is called with a lane's number before each student takes it, and seeds the networks' random numbers; None:
    they are seeded already. Students take turns (:class:`Turns`): one student's activations are held at a time. A
    student that finds no memory is added to ``failed`` with what the allocator said, and the others have their step;
    None: its error is raised. ``streams``: one a student, on which it works beside the others.
    """
    turns = Turns(students, failed, streams)
    logs: dict[Student, list[dict[str, Tensor]]] = {student: [] for student in students}
    records: dict[Student, StepRecord] = {}
    ids: list[Tensor] = []
    view = 0
    for student in turns:
        with turns.of(student):
            student.optimizer.zero_grad(set_to_none=True)
            student.norms.begin_step()
    for lane in lanes:
        for student in turns:
            with turns.of(student):
                if seed is not None:
                    seed(lane.number)
                features = student.asks_for(lane.teacher)
                log = backward_lane(  # forward and backward; DDP adds up the workers' gradients in the last lane
                    student.model,
                    lane.images_BCHW,
                    lane.labels_B,
                    lane.ids_B,
                    features,
                    weight=student.context.world_size / student.config.train.lanes,
                    last=lane.number == student.my_lanes[-1],
                )
                logs[student].append(log)
                student.distiller.loss.observe(features, lane.labels_B, lane.ids_B)
                student.norms.end_lane()
        ids.append(lane.ids_B)
        view = lane.view
    for student in turns:
        with turns.of(student):
            student.norms.end_step()
            student.sum_gradients()
            student.leave_alone()
            if student.config.optim.clip_norm:
                torch.nn.utils.clip_grad_norm_(student.distiller.parameters(), student.config.optim.clip_norm)
            student.optimizer.step()
            student.distiller.loss.after_step(partial(gather_lanes, lanes=student.config.train.lanes))
            records[student] = StepRecord(mean_log(logs[student]), ids, view)
    return records


def mean_log(logs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean breakdown of lanes."""
    lanes_LM = torch.stack([torch.stack(list(log.values())) for log in logs])
    means_M = lanes_LM.mean(0) if len(lanes_LM) > 1 else lanes_LM[0]
    return dict(zip(logs[0], means_M.unbind(), strict=True))


def seed_lane(seed: int, step: int, lane: int) -> None:
    """Seed the model's own random numbers (dropout and such) for one lane of one step.

    `torch.manual_seed` would do the same, and take about a millisecond where there is no GPU: for each kind of device
    that is not in use it keeps the present stack as text.
    """
    number = derive(seed, "lane", step, lane)
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


def backward_lane(
    model: DistributedDataParallel | StudentModule,
    images_BCHW: Tensor,
    labels_B: Tensor,
    ids_B: Tensor,
    teacher: Features | None,
    weight: float,
    last: bool,
) -> dict[str, Tensor]:
    """Forward and backward of one lane. Gradients accumulate; with DDP the last lane of a step synchronises workers.

    DDP, like SummedGradients, divides the sum over workers by their number, so ``weight`` is workers / lanes: gradients
    end up summed over all lanes of the step and divided by their number, for even and uneven deals.
    """
    quiet = isinstance(model, DistributedDataParallel) and not last
    with model.no_sync() if quiet else nullcontext():  # type: ignore[operator]
        loss, log = model(images_BCHW, labels_B, ids_B, teacher)
        (loss * weight).backward()
    return log
