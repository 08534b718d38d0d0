"""Training students in this process, fed with batches that are made beforehand: the loader takes no part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from mimkd_ray.cli.local_launch import LocalContext
from mimkd_ray.data.loading.batches import LaneBatch
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.models.build_model import build_model
from mimkd_ray.recipes import IMAGENET_RECIPES
from mimkd_ray.train.engine.student import Student, lone_student


def make_student(teacher: str, student: str, lanes: int, lane_batch: int, size: int, device: torch.device) -> Student:
    """A student with the accuracy loss on images of ``size`` squared, about to take step 0; all weights are random."""
    base = IMAGENET_RECIPES["r34_r18"]()
    config = replace(
        base,
        data=replace(base.data, root="digits", pipeline="none", image_size=size, window="full", loader_workers=0),
        teacher=replace(base.teacher, name=teacher, weights="random", expect_top1=0, allow_chance=True),
        student=replace(base.student, name=student),
        train=replace(base.train, lanes=lanes, lane_batch=lane_batch),
    )
    made = lone_student(config, open_data(config.data), build_model(teacher, 10), LocalContext(device))
    made.inputs.start(0, batches(made))
    return made


def batches(student: Student) -> Iterator[LaneBatch]:
    """The same random images again and again, labelled with the step and lane that are next."""
    train, size = student.config.train, student.config.data.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (train.lane_batch, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (train.lane_batch,), generator=generator)
    ids, device = torch.arange(train.lane_batch), student.context.device
    images, labels, ids = images.to(device), labels.to(device), ids.to(device)
    step = 0
    while True:
        for lane in range(train.lanes):
            yield LaneBatch(step, lane, images, labels, ids, 0, ())
        step += 1
