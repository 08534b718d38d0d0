"""Rivals against slow references: loops over images, places and classes in float64, without torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch

from mimkd_ray.config import LossConfig
from mimkd_ray.losses.features import Features
from mimkd_ray.losses.methods.base import Rival, RivalTaps, Side, TapPair
from mimkd_ray.losses.methods.build_method import RivalPlan, build_rival
from mimkd_ray.losses.methods.crd import TrainingRows
from mimkd_ray.losses.methods.registry import Method

BATCH, CLASSES = 5, 4
LABELS = torch.tensor([0, 3, 1, 1, 2])
IDS = torch.tensor([7, 3, 12, 9, 4])
ROWS = TrainingRows(torch.arange(3, 33), torch.arange(30) * 7 % CLASSES)
"""Of a training set that the batch's ids are from; LABELS are not its labels, which only CRD reads."""
TEACHER_VECTOR, STUDENT_VECTOR = 6, 3
TEACHER_MAPS, STUDENT_MAPS = ((4, 8, 8), (6, 4, 4), (7, 2, 2)), ((3, 8, 8), (5, 4, 4), (4, 2, 2))
"""Channels, height and width, shallow to deep."""


class Arrays(NamedTuple):
    """Features of one network, as numpy arrays."""

    logits: np.ndarray
    vector: np.ndarray
    maps: list[np.ndarray]


Reference = Callable[[Arrays, Arrays], float]


def taps(vectors: bool = False, maps: int = 0, teacher_maps=TEACHER_MAPS, student_maps=STUDENT_MAPS) -> RivalTaps:
    """Of the pooled vectors, and of the deepest `maps` stages."""
    pairs = [
        TapPair(Side(f"t{number}", *teacher), Side(f"s{number}", *student))
        for number, (teacher, student) in enumerate(zip(teacher_maps, student_maps, strict=True))
    ]
    vector = TapPair(Side("tv", TEACHER_VECTOR), Side("sv", STUDENT_VECTOR))
    return RivalTaps((vector,) if vectors else (), tuple(pairs[len(pairs) - maps :]))


def build(method: Method, own: RivalTaps, seed: int = 0, **fields: float) -> Rival:
    """In float64, its parameters away from their start. ``fields`` are those of LossConfig."""
    torch.manual_seed(seed)
    rival = build_rival(RivalPlan(method, own), LossConfig(**fields), ROWS).double()
    with torch.no_grad():
        for parameter in rival.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return rival


def features(seed: int, who: str, maps, vector: int) -> Features:
    """Random ones in float64; maps are positive in half of their places, as behind a ReLU."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)

    return Features(
        2 * draw(CLASSES),
        {f"{who}v": draw(vector)},
        {f"{who}{number}": draw(*shape).relu() + 0.01 * draw(*shape) for number, shape in enumerate(maps)},
    )


def both(seed: int = 0, teacher_maps=TEACHER_MAPS, student_maps=STUDENT_MAPS) -> tuple[Features, Features]:
    return (
        features(2 * seed, "t", teacher_maps, TEACHER_VECTOR),
        features(2 * seed + 1, "s", student_maps, STUDENT_VECTOR),
    )


def leaves(value: Features) -> list[torch.Tensor]:
    return [value.logits_BC, *value.vectors.values(), *value.maps.values()]


def arrays(value: Features) -> Arrays:
    (vector,) = value.vectors.values()
    return Arrays(
        value.logits_BC.detach().numpy().copy(),
        vector.detach().numpy().copy(),
        [each.detach().numpy().copy() for each in value.maps.values()],
    )


def check(rival: Rival, reference: Reference, teacher: Features, student: Features, rel: float = 1e-9) -> float:
    """Value and gradient equal the reference's, whose gradient is found by central differences. Returns the value."""
    for leaf in (*leaves(teacher), *leaves(student)):
        leaf.requires_grad_()
    loss = rival(teacher, student, LABELS, IDS)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    of_teacher, of_student = arrays(teacher), arrays(student)
    assert loss.item() == pytest.approx(reference(of_teacher, of_student), rel=rel)
    loss.backward()
    assert all(leaf.grad is None for leaf in leaves(teacher))
    chance = np.random.default_rng(0)
    seen = 0
    for leaf, array in zip(leaves(student), (of_student.logits, of_student.vector, *of_student.maps), strict=True):
        gradient = np.zeros_like(array) if leaf.grad is None else leaf.grad.numpy()
        seen += int(np.any(gradient != 0))
        for flat in chance.choice(array.size, 5, replace=False):
            place = np.unravel_index(flat, array.shape)
            value, step = array[place], 1e-5
            array[place] = value + step
            above = reference(of_teacher, of_student)
            array[place] = value - step
            slope = (above - reference(of_teacher, of_student)) / (2 * step)
            array[place] = value
            assert gradient[place] == pytest.approx(slope, rel=1e-5, abs=1e-8)
    assert seen, "no gradient reaches the student"
    return loss.item()


def softmax(logits: np.ndarray) -> np.ndarray:
    """Of one row."""
    scaled = np.exp(logits - logits.max())
    return scaled / scaled.sum()
