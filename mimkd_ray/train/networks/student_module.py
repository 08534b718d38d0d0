"""The student with its taps, critics and loss as one module, and what is around it in a step: normalisation of images,
batch-norm statistics of lanes, and data parallelism."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mimkd_ray.losses.features import Features
from mimkd_ray.losses.mimkd_loss import LossOutput, MIMKDLoss
from mimkd_ray.taps.tapped_model import TappedModel, TapShape
from mimkd_ray.train.distributed import all_sum
from mimkd_ray.train.networks.teacher import canonical

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class StudentModule(nn.Module):
    """Student, taps, critics and loss: forward gives (loss, breakdown), so compilation and DDP see all of it.

    Hooks are set before compilation, ``compile()`` goes inside and DDP outside.
    """

    def __init__(
        self,
        student: nn.Module,
        shapes: Mapping[str, TapShape],
        vectors: Iterable[str],
        maps: Iterable[str],
        loss: MIMKDLoss,
        autocast: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.vectors, self.maps = tuple(vectors), tuple(maps)
        self.shapes = dict(shapes)
        self.student = TappedModel(student, sorted({*self.vectors, *self.maps}))
        self.loss = loss
        self.autocast = autocast

    def output(
        self,
        images_BCHW: Tensor,
        labels_B: Tensor,
        ids_B: Tensor,
        teacher: Features | None,
        reading: bool = False,
    ) -> tuple[LossOutput, Tensor]:
        """The loss with all its parts, and the student's logits. Images are normalised."""
        with torch.autocast(images_BCHW.device.type, self.autocast, enabled=self.autocast is not None):
            logits_BC, taps = self.student(images_BCHW)
        features = canonical(logits_BC, taps, self.shapes, self.vectors, self.maps)
        return self.loss(teacher, features, labels_B, ids_B, reading), logits_BC

    def forward(
        self, images_BCHW: Tensor, labels_B: Tensor, ids_B: Tensor, teacher: Features | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one lane (scalar) and its breakdown (detached scalars)."""
        result, _ = self.output(images_BCHW, labels_B, ids_B, teacher)
        return result.total, result.log


class Normalizer:
    """uint8 images to normalised floats on the device, in the run's memory format."""

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        dtype: torch.dtype,
        channels_last: bool,
    ) -> None:
        # (x / 255 - mean) / std = x * scale + shift: one fused multiply-add over the batch
        self.scale = torch.tensor([1 / (255 * s) for s in std], dtype=dtype, device=device).view(3, 1, 1)
        self.shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=dtype, device=device).view(
            3, 1, 1
        )
        self.device, self.dtype = device, dtype
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 on any device -> normalised, on this device."""
        images = images_BCHW.to(self.device, non_blocking=True).to(self.dtype, memory_format=self.memory_format)
        return torch.addcmul(self.shift, images, self.scale)


class LaneNorms:
    """Running batch-norm statistics over several lanes of one step.

    Every lane starts from the step's initial statistics and the results are averaged: an exponential average is
    linear, so this equals one worker per lane whose statistics are averaged later.
    """

    def __init__(self, module: nn.Module, my_lanes: int, lanes: int) -> None:
        self.my_lanes, self.lanes = my_lanes, lanes
        self.buffers = [
            buffer
            for norm in module.modules()
            if isinstance(norm, _BATCH_NORMS) and norm.track_running_stats
            for buffer in (norm.running_mean, norm.running_var)
            if buffer is not None
        ]
        self.counters = [
            norm.num_batches_tracked
            for norm in module.modules()
            if isinstance(norm, _BATCH_NORMS) and norm.num_batches_tracked is not None
        ]
        several = my_lanes > 1
        self.start, self.total = ([torch.empty_like(buffer) for buffer in self.buffers if several] for _ in range(2))
        self.counts = [torch.empty_like(counter) for counter in self.counters if several]

    # Operations on lists: a GPU takes as long to begin one of a single buffer as for the work of all.
    def begin_step(self) -> None:
        """Remember the step's initial statistics."""
        if self.start:
            torch._foreach_copy_(self.start, self.buffers)
            torch._foreach_zero_(self.total)
        if self.counts:
            torch._foreach_copy_(self.counts, self.counters)

    def end_lane(self) -> None:
        """Collect what a lane made of them, and go back to the start."""
        if self.start:
            torch._foreach_add_(self.total, self.buffers)
            torch._foreach_copy_(self.buffers, self.start)

    def end_step(self) -> None:
        """Keep the average over this worker's lanes."""
        if self.start:
            torch._foreach_div_(self.total, self.my_lanes)
            torch._foreach_copy_(self.buffers, self.total)
        if self.counts:
            torch._foreach_add_(self.counts, 1)  # a step counts once, whoever carries how many lanes
            torch._foreach_copy_(self.counters, self.counts)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A with-block in which the statistics are averages over all workers, weighted by their lanes: for an
        evaluation or an export. Each worker then goes on from its own, so that looking changes nothing."""
        own = [buffer.clone() for buffer in self.buffers]
        self.average_()
        yield
        for buffer, value in zip(self.buffers, own, strict=True):
            buffer.copy_(value)

    def average_(self) -> None:
        """Average the statistics over all workers, weighted by their lanes. Every worker takes part."""
        if self.buffers and self.my_lanes != self.lanes:
            self.load(all_sum(self.flat() * (self.my_lanes / self.lanes)))

    def flat(self) -> Tensor:
        """This worker's statistics as one vector."""
        return torch.cat([buffer.flatten() for buffer in self.buffers]) if self.buffers else torch.zeros(0)

    def load(self, flat: Tensor) -> None:
        """Take over statistics in the form of :meth:`flat`."""
        parts = flat.split([buffer.numel() for buffer in self.buffers])
        for buffer, part in zip(self.buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))


def data_parallel(module: nn.Module, alike: bool = True) -> DistributedDataParallel:
    """Wrap ``module`` in DDP with the same arithmetic after a restart, buffers left alone. ``alike``: all workers get
    the first one's parameters and buffers. ``module`` may be compiled before or after, because the loop has torch not
    split compiled graphs for DDP (optimize_ddp=False in train/loop.py).

    With find_unused_parameters a parameter may go without a gradient, always or in some steps (a layer that the
    network has and does not use, a lane without a valid negative), and several workers then train as one does. DDP
    also keeps the buckets that it made at the start. Otherwise it deals gradients to other buckets after the first
    backward of a process, and with three or more ranks the place in a bucket decides how a sum is rounded: a resumed
    run would drift from an undisturbed one. It costs a walk through the graph of a step's last lane and the sum of one
    integer for each parameter. Where every parameter has a gradient, torch warns once that the option may be left out.

    Batch-norm statistics belong to lanes and are averaged by :class:`LaneNorms`.
    """
    # torch 2.15 renames the option and warns about the old name.
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    return DistributedDataParallel(module, find_unused_parameters=True, init_sync=alike, **options)
