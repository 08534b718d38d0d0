"""ReviewKD against loops over levels, places and channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rival_checks import Arrays, both, build, check, taps
from torch import nn

from mimkd_ray.losses.methods.base import Rival
from mimkd_ray.losses.methods.review import Fusion, ReviewKD, hierarchical_loss

SIZES = (((4, 6, 6), (6, 4, 4), (7, 2, 2)), ((3, 8, 8), (5, 4, 4), (4, 2, 2)))


def convolution(images: np.ndarray, layer: nn.Conv2d) -> np.ndarray:
    """A 1x1 or 3x3 one that keeps the size."""
    weight = layer.weight.detach().numpy()
    pad = weight.shape[2] // 2
    padded = np.pad(images, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    out = np.empty((len(images), len(weight), *images.shape[2:]))
    for y, x in np.ndindex(images.shape[2:]):
        window = padded[:, :, y : y + weight.shape[2], x : x + weight.shape[3]]
        out[:, :, y, x] = np.tensordot(window, weight, axes=((1, 2, 3), (1, 2, 3)))
    return out if layer.bias is None else out + layer.bias.detach().numpy()[:, None, None]


def norm(images: np.ndarray, layer: nn.BatchNorm2d) -> np.ndarray:
    mean, variance = images.mean((0, 2, 3), keepdims=True), images.var((0, 2, 3), keepdims=True)
    scale, shift = (p.detach().numpy()[:, None, None] for p in (layer.weight, layer.bias))
    return (images - mean) / np.sqrt(variance + 1e-5) * scale + shift


def resized(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows = [y * images.shape[2] // size[0] for y in range(size[0])]
    columns = [x * images.shape[3] // size[1] for x in range(size[1])]
    return images[:, :, rows][:, :, :, columns]


def slow_hcl(teacher: np.ndarray, student: np.ndarray) -> float:
    """Squares maps only: windows of a size that divides the map's, or that overlap."""
    losses, weights = [((teacher - student) ** 2).mean()], [1.0]
    for side in (4, 2, 1):
        height, width = teacher.shape[2:]
        if side >= height:
            continue
        squares = []
        for y, x in np.ndindex(side, side):
            rows = slice(y * height // side, -(-(y + 1) * height // side))
            columns = slice(x * width // side, -(-(x + 1) * width // side))
            a, b = (each[:, :, rows, columns].mean((2, 3)) for each in (teacher, student))
            squares.append(((a - b) ** 2).mean())
        losses.append(np.mean(squares))
        weights.append(weights[-1] / 2)
    return float(np.dot(losses, weights) / sum(weights))


def slow_review(rival: Rival, teacher: Arrays, student: Arrays) -> float:
    assert isinstance(rival, ReviewKD)
    of_teacher = [teacher.vector[:, :, None, None], *teacher.maps[::-1]]
    of_student = [student.vector[:, :, None, None], *student.maps[::-1]]
    total, review = 0.0, None
    for fusion, goal, given in zip(rival.fusions, of_teacher, of_student, strict=True):
        assert isinstance(fusion, Fusion)
        own = norm(convolution(given, fusion.enter[0]), fusion.enter[1])
        if review is not None:
            deeper = resized(review, own.shape[2:])
            both_maps = convolution(np.concatenate([own, deeper], axis=1), fusion.attention[0])
            share = 1 / (1 + np.exp(-both_maps))
            own = own * share[:, :1] + deeper * share[:, 1:]
        review = resized(own, goal.shape[2:])
        total += slow_hcl(goal, norm(convolution(review, fusion.leave[0]), fusion.leave[1]))
    return total


@pytest.mark.parametrize("sizes", [pytest.param(None, id="equal"), pytest.param(SIZES, id="unequal")])
def test_review(sizes) -> None:
    maps = dict(zip(("teacher_maps", "student_maps"), sizes, strict=True)) if sizes else {}
    rival = build("review", taps(vectors=True, maps=3, **maps))
    check(rival, lambda teacher, student: slow_review(rival, teacher, student), *both(0, **maps))


def test_shallow_levels_hear_of_deep_ones() -> None:
    student = both()[1]
    student.vectors["sv"].requires_grad_()
    rival = build("review", taps(vectors=True, maps=3))
    assert isinstance(rival, ReviewKD)
    review = None
    for level, given in enumerate([student.vectors["sv"][:, :, None, None], student.maps["s2"], student.maps["s1"]]):
        made, review = rival.fusions[level](given, review, given.shape[2:])
    (gradient,) = torch.autograd.grad(made.square().sum(), student.vectors["sv"])
    assert gradient.abs().sum() > 0


def test_hierarchical_loss_is_nought_at_equality_and_sees_shifts_less_when_coarse() -> None:
    teacher = both()[0].maps["t0"]
    assert hierarchical_loss(teacher, teacher).item() == 0
    assert hierarchical_loss(teacher, teacher + 1).item() == pytest.approx(1, rel=1e-9)
    checker = torch.ones(8, 8, dtype=torch.float64)
    checker[::2, ::2] = checker[1::2, 1::2] = -1
    assert hierarchical_loss(teacher, teacher + checker).item() == pytest.approx(1 / 1.875, rel=1e-9)


def test_the_middle_is_as_wide_as_the_students_deepest_level() -> None:
    rival = build("review", taps(vectors=True, maps=3))
    assert isinstance(rival, ReviewKD)
    assert {fusion.enter[0].out_channels for fusion in rival.fusions} == {3}
