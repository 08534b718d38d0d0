"""FitNet, AT, SP and VID against loops over images, channels and places."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from rival_checks import BATCH, IDS, LABELS, Arrays, both, build, check, taps
from torch import nn

from mimkd_ray.losses.features import Features
from mimkd_ray.losses.methods.base import Rival, Side
from mimkd_ray.losses.methods.fitnet import FitNet, Regressor
from mimkd_ray.losses.methods.vid import VID

SIZES = (((4, 8, 8), (6, 4, 4), (7, 2, 3)), ((3, 4, 8), (5, 4, 4), (4, 3, 2)))
"""Pairs of maps of which either is the larger one, in one direction or both."""


def pooled(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(C, H, W) to (C, height, width): means over windows that cover the map and may overlap."""
    channels, rows, columns = image.shape
    out = np.empty((channels, height, width))
    for y in range(height):
        for x in range(width):
            top, bottom = y * rows // height, -(-(y + 1) * rows // height)
            left, right = x * columns // width, -(-(x + 1) * columns // width)
            out[:, y, x] = image[:, top:bottom, left:right].mean((1, 2))
    return out


def same_size(teacher: np.ndarray, student: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    height, width = (min(a, b) for a, b in zip(teacher.shape[1:], student.shape[1:], strict=True))
    return pooled(teacher, height, width), pooled(student, height, width)


def slow_at(teacher: Arrays, student: Arrays) -> float:
    def attention(image: np.ndarray) -> np.ndarray:
        found = np.array([sum(value**2 for value in image[:, y, x]) for y, x in np.ndindex(image.shape[1:])])
        return found / math.sqrt((found**2).sum())

    total = 0.0
    for of_teacher, of_student in zip(teacher.maps, student.maps, strict=True):
        for image in range(BATCH):
            a, b = same_size(of_teacher[image], of_student[image])
            total += float(((attention(a) - attention(b)) ** 2).mean()) / BATCH
    return total


def slow_sp(teacher: Arrays, student: Arrays) -> float:
    def similarity(maps: np.ndarray) -> np.ndarray:
        found = np.array([[float((a * b).sum()) for b in maps] for a in maps])
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    a, b = similarity(teacher.maps[-1]), similarity(student.maps[-1])
    return sum((a[i, j] - b[i, j]) ** 2 for i in range(BATCH) for j in range(BATCH)) / BATCH**2


def slow_vid(rival: Rival, teacher: Arrays, student: Arrays) -> float:
    assert isinstance(rival, VID)
    total = 0.0
    for gaussian, of_teacher, of_student in zip(rival.gaussians, teacher.maps, student.maps, strict=True):
        weights = [layer.weight.detach().numpy()[:, :, 0, 0] for layer in gaussian.mean if isinstance(layer, nn.Conv2d)]
        alpha = gaussian.alpha.detach().numpy()
        terms = []
        for image in range(BATCH):
            a, b = same_size(of_teacher[image], of_student[image])
            for y, x in np.ndindex(a.shape[1:]):
                hidden = np.maximum(weights[0] @ b[:, y, x], 0)
                mean = weights[2] @ np.maximum(weights[1] @ hidden, 0)
                for channel in range(len(a)):
                    variance = math.log(1 + math.exp(alpha[channel])) + 1e-5
                    terms.append(0.5 * ((a[channel, y, x] - mean[channel]) ** 2 / variance + math.log(variance)))
        total += sum(terms) / len(terms)
    return total


@pytest.mark.parametrize(("seed", "sizes"), [pytest.param(0, None, id="equal"), pytest.param(1, SIZES, id="unequal")])
def test_at(seed: int, sizes) -> None:
    maps = dict(zip(("teacher_maps", "student_maps"), sizes, strict=True)) if sizes else {}
    check(build("at", taps(maps=3, **maps)), slow_at, *both(seed, **maps))


@pytest.mark.parametrize("seed", [0, 1])
def test_sp(seed: int) -> None:
    check(build("sp", taps(maps=1)), slow_sp, *both(seed))


@pytest.mark.parametrize("sizes", [pytest.param(None, id="equal"), pytest.param(SIZES, id="unequal")])
def test_vid(sizes) -> None:
    maps = dict(zip(("teacher_maps", "student_maps"), sizes, strict=True)) if sizes else {}
    rival = build("vid", taps(maps=3, **maps))
    check(rival, lambda teacher, student: slow_vid(rival, teacher, student), *both(0, **maps))


def test_vid_starts_with_a_variance_of_five() -> None:
    torch.manual_seed(0)
    for gaussian in VID(taps(maps=3)).gaussians:
        assert torch.nn.functional.softplus(gaussian.alpha).tolist() == pytest.approx([5 - 1e-5] * len(gaussian.alpha))


def slow_convolution(image: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int, pad: int) -> np.ndarray:
    """(C, H, W) with (O, C, h, w)."""
    image = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
    height = (image.shape[1] - weight.shape[2]) // stride + 1
    width = (image.shape[2] - weight.shape[3]) // stride + 1
    out = np.empty((len(weight), height, width))
    for channel, y, x in np.ndindex(out.shape):
        window = image[:, stride * y : stride * y + weight.shape[2], stride * x : stride * x + weight.shape[3]]
        out[channel, y, x] = (window * weight[channel]).sum() + bias[channel]
    return out


def slow_transposed(image: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Kernel 4, stride 2, padding 1; weight (C, O, 4, 4): every value adds a patch to the output."""
    channels, height, width = image.shape
    out = np.zeros((weight.shape[1], 2 * height + 2, 2 * width + 2))
    for channel, y, x in np.ndindex(channels, height, width):
        out[:, 2 * y : 2 * y + 4, 2 * x : 2 * x + 4] += image[channel, y, x] * weight[channel]
    return out[:, 1:-1, 1:-1] + bias[:, None, None]


def slow_fitnet(rival: Rival, teacher: Arrays, student: Arrays) -> float:
    assert isinstance(rival, FitNet)
    (regressor,) = rival.regressors
    assert isinstance(regressor, Regressor)
    weight, bias = (parameter.detach().numpy() for parameter in regressor.convolution.parameters())
    goal, given = teacher.maps[-1], student.maps[-1]
    side, own = goal.shape[2:], given.shape[2:]
    if own == tuple(2 * size for size in side):
        made = [slow_convolution(image, weight, bias, stride=2, pad=1) for image in given]
    elif side == tuple(2 * size for size in own):
        made = [slow_transposed(image, weight, bias) for image in given]
    else:
        if side[0] > own[0]:  # each place of the larger map takes the one that it lies in
            rows = [y * own[0] // side[0] for y in range(side[0])]
            columns = [x * own[1] // side[1] for x in range(side[1])]
            given = given[:, :, rows][:, :, :, columns]
        made = [slow_convolution(image, weight, bias, stride=1, pad=0) for image in given]
    found = np.stack(made)
    mean, variance = found.mean((0, 2, 3), keepdims=True), found.var((0, 2, 3), keepdims=True)
    scale, shift = (p.detach().numpy()[:, None, None] for p in (regressor.norm.weight, regressor.norm.bias))
    predicted = np.maximum((found - mean) / np.sqrt(variance + 1e-5) * scale + shift, 0)
    return float(((predicted - goal) ** 2).mean())


@pytest.mark.parametrize(
    ("teacher_map", "student_map", "kind"),
    [
        pytest.param((6, 4, 4), (5, 4, 4), nn.Conv2d, id="same"),
        pytest.param((6, 2, 2), (5, 4, 4), nn.Conv2d, id="twice"),
        pytest.param((6, 4, 4), (5, 2, 2), nn.ConvTranspose2d, id="half"),
        pytest.param((6, 3, 4), (5, 5, 4), nn.Conv2d, id="larger"),
        pytest.param((6, 5, 5), (5, 3, 3), nn.Conv2d, id="smaller"),
    ],
)
def test_fitnet(teacher_map, student_map, kind) -> None:
    maps = {"teacher_maps": (teacher_map,), "student_maps": (student_map,)}
    rival = build("fitnet", taps(maps=1, **maps))
    assert isinstance(rival.regressors[0].convolution, kind)
    check(rival, lambda teacher, student: slow_fitnet(rival, teacher, student), *both(0, **maps))


@pytest.mark.parametrize("method", ["at", "sp"])
def test_scale_and_equality(method) -> None:
    teacher, _ = both()
    maps = 3 if method == "at" else 1
    own = taps(maps=maps, student_maps=((4, 8, 8), (6, 4, 4), (7, 2, 2)))

    def loss(factor: float, flip: bool) -> float:
        value = {f"s{tap[1:]}": factor * (each.flip(0) if flip else each) for tap, each in teacher.maps.items()}
        return build(method, own)(teacher, Features(teacher.logits_BC, {}, value), LABELS, IDS).item()

    assert loss(3.0, flip=False) == pytest.approx(0, abs=1e-12)
    assert loss(0.5, flip=True) == pytest.approx(loss(2.0, flip=True), rel=1e-9)
    assert loss(1.0, flip=True) > 1e-4


def test_channels_may_be_rotated_for_at() -> None:
    """Attention is what all channels say together."""
    teacher, _ = both()
    turned = {}
    for tap, each in teacher.maps.items():
        rotation = torch.linalg.qr(torch.randn(each.shape[1], each.shape[1], dtype=torch.float64))[0]
        turned[f"s{tap[1:]}"] = torch.einsum("bchw,dc->bdhw", each, rotation)
    own = taps(maps=3, student_maps=((4, 8, 8), (6, 4, 4), (7, 2, 2)))
    student = Features(teacher.logits_BC, {}, turned)
    assert build("at", own)(teacher, student, LABELS, IDS).item() == pytest.approx(0, abs=1e-12)


def test_regressors_have_the_teachers_shape() -> None:
    for student, teacher in (((3, 9, 9), (4, 5, 5)), ((3, 7, 7), (4, 14, 14)), ((3, 8, 2), (4, 4, 4))):
        made = Regressor(Side("s", *student), Side("t", *teacher))(torch.randn(2, *student))
        assert made.shape == (2, *teacher)
        assert (made >= 0).all()
