"""One module for student, taps, critics and loss, and one optimiser step over the lanes of a worker."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from mimkd_ray.losses.mimkd import Features, LossOutput, MIMKDLoss
from mimkd_ray.models.taps import TappedModel, TapShape
from mimkd_ray.train.context import all_sum
from mimkd_ray.train.teacher import canonical


class Distiller(nn.Module):
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
            if isinstance(norm, _BatchNorm) and norm.track_running_stats
            for buffer in (norm.running_mean, norm.running_var)
            if buffer is not None
        ]

    def begin_step(self) -> None:
        """Remember the step's initial statistics."""
        if self.my_lanes > 1:
            self.start = [buffer.clone() for buffer in self.buffers]
            self.total = [torch.zeros_like(buffer) for buffer in self.buffers]

    def end_lane(self) -> None:
        """Collect what a lane made of them, and go back to the start."""
        if self.my_lanes > 1 and self.buffers:
            torch._foreach_add_(self.total, self.buffers)
            torch._foreach_copy_(self.buffers, self.start)

    def end_step(self) -> None:
        """Keep the average over this worker's lanes."""
        if self.my_lanes > 1:
            for buffer, total in zip(self.buffers, self.total, strict=True):
                buffer.copy_(total / self.my_lanes)

    def average_over_workers(self) -> None:
        """Average over all workers, weighted by their lanes; before a checkpoint or an evaluation."""
        if self.buffers and self.my_lanes != self.lanes:
            flat = torch.cat([buffer.flatten() for buffer in self.buffers]) * (self.my_lanes / self.lanes)
            parts = all_sum(flat).split([buffer.numel() for buffer in self.buffers])
            for buffer, part in zip(self.buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))


def data_parallel(module: nn.Module) -> DistributedDataParallel:
    """DDP that leaves buffers alone: batch-norm statistics belong to lanes and are averaged by :class:`LaneNorms`."""
    # torch 2.15 renames the option and warns about the old name.
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    return DistributedDataParallel(module, **options)


def seed_lane(seed: int, step: int, lane: int) -> None:
    """Seed the model's own random numbers (dropout and such) for one lane of one step."""
    torch.manual_seed((seed * 1_000_003 + step) * 4_099 + lane)


def backward_lane(
    model: DistributedDataParallel | Distiller,
    images_BCHW: Tensor,
    labels_B: Tensor,
    ids_B: Tensor,
    teacher: Features | None,
    weight: float,
    last: bool,
) -> dict[str, Tensor]:
    """Forward and backward of one lane. Gradients accumulate; only the last lane of a step synchronises workers.

    DDP divides the sum over workers by their number, so ``weight`` is workers / lanes: gradients end up summed over
    all lanes of the step and divided by their number, for even and uneven deals.
    """
    quiet = isinstance(model, DistributedDataParallel) and not last
    with model.no_sync() if quiet else nullcontext():  # type: ignore[operator]
        loss, log = model(images_BCHW, labels_B, ids_B, teacher)
        (loss * weight).backward()
    return log
