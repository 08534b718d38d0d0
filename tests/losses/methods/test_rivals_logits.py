"""DKD and DIST against loops over images and classes."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from rival_checks import BATCH, CLASSES, IDS, LABELS, Arrays, both, build, check, softmax, taps

from mimkd_ray.losses.features import Features
from mimkd_ray.losses.methods.kd import kd_loss


def slow_dkd(teacher: Arrays, student: Arrays, beta: float = 8.0, temperature: float = 4.0) -> float:
    total = 0.0
    for image in range(BATCH):
        label = int(LABELS[image])
        q, p = softmax(teacher.logits[image] / temperature), softmax(student.logits[image] / temperature)
        target = q[label] * math.log(q[label] / p[label])
        target += (1 - q[label]) * math.log((1 - q[label]) / (1 - p[label]))
        others = 0.0
        for cls in range(CLASSES):
            if cls != label:
                among_q, among_p = q[cls] / (1 - q[label]), p[cls] / (1 - p[label])
                others += among_q * math.log(among_q / among_p)
        total += temperature**2 * (target + beta * others) / BATCH
    return total


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def slow_dist(teacher: Arrays, student: Arrays, temperature: float = 4.0) -> float:
    q = np.stack([softmax(row / temperature) for row in teacher.logits])
    p = np.stack([softmax(row / temperature) for row in student.logits])
    inter = 1 - np.mean([correlation(p[image], q[image]) for image in range(BATCH)])
    intra = 1 - np.mean([correlation(p[:, cls], q[:, cls]) for cls in range(CLASSES)])
    return temperature**2 * (2 * inter + 2 * intra)


def slow_standardised_kd(teacher: Arrays, student: Arrays, temperature: float = 2.0) -> float:
    total = 0.0
    for of_teacher, of_student in zip(teacher.logits, student.logits, strict=True):
        rows = (of_teacher, of_student)
        q, p = (softmax((row - row.mean()) / math.sqrt(row.var() + 1e-5) / temperature) for row in rows)
        total += temperature**2 * sum(a * math.log(a / b) for a, b in zip(q, p, strict=True)) / BATCH
    return total


def test_kd_of_standardised_logits() -> None:
    """It equals its formula, takes no notice of the logits' size, and has a gradient where they are all equal."""
    teacher, student = both(0)
    found = check(
        lambda t, s, *_: kd_loss(s.logits_BC, t.logits_BC, 2.0, standardise=True),
        slow_standardised_kd,
        teacher,
        student,
    )
    other = kd_loss(7 * student.logits_BC + 3, teacher.logits_BC / 5 - 1, 2.0, standardise=True)
    assert other.item() == pytest.approx(found, rel=1e-3), "but for the epsilon in the variance"
    equal = torch.zeros_like(student.logits_BC, requires_grad=True)
    kd_loss(equal, teacher.logits_BC, 2.0, standardise=True).backward()
    assert torch.isfinite(equal.grad).all()
    assert equal.grad.abs().max() > 0


@pytest.fixture
def no_eps(monkeypatch) -> None:
    """DIST's EPS is of the loss and not of the formula."""
    monkeypatch.setattr("mimkd_ray.losses.methods.dist.EPS", 0.0)


@pytest.mark.parametrize("seed", [0, 1])
def test_dkd(seed: int) -> None:
    check(build("dkd", taps()), slow_dkd, *both(seed))


@pytest.mark.usefixtures("no_eps")
@pytest.mark.parametrize("seed", [0, 1])
def test_dist(seed: int) -> None:
    check(build("dist", taps()), slow_dist, *both(seed))


@pytest.mark.usefixtures("no_eps")
def test_constants_of_imagenet() -> None:
    """The published constants of ImageNet: DKD's beta 0.5 and temperature 1, DIST's temperature 1."""
    dkd = build("dkd", taps(), dkd_beta=0.5, dkd_temperature=1.0)
    check(dkd, partial(slow_dkd, beta=0.5, temperature=1.0), *both())
    check(build("dist", taps(), dist_temperature=1.0), partial(slow_dist, temperature=1.0), *both())


def test_dkd_is_kd_where_its_factor_is_put_back() -> None:
    teacher, student = both()
    target = build("dkd", taps(), dkd_beta=0.0)(teacher, student, LABELS, IDS)
    total = 0.0
    for image in range(BATCH):
        one = [Features(value.logits_BC[image : image + 1], value.vectors, value.maps) for value in (teacher, student)]
        label = LABELS[image : image + 1]
        both_parts = build("dkd", taps(), dkd_beta=1.0)(*one, label, IDS[image : image + 1])
        first = build("dkd", taps(), dkd_beta=0.0)(*one, label, IDS[image : image + 1])
        others_share = 1 - (one[0].logits_BC / 4).softmax(1)[0, label]
        total += (first + others_share * (both_parts - first)).item() / BATCH
    assert target.item() > 0
    assert total == pytest.approx(kd_loss(student.logits_BC, teacher.logits_BC, 4.0).item(), rel=1e-9)


@pytest.mark.usefixtures("no_eps")
def test_dist_asks_for_linear_relations_alone() -> None:
    teacher, _ = both()
    chances = (teacher.logits_BC / 4).softmax(1)
    mixed = 4 * (0.3 * chances + 0.7 / CLASSES).log()  # of every image the same mix of its chances and even ones
    student = Features(mixed, {}, {})
    assert build("dist", taps())(teacher, student, LABELS, IDS).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.usefixtures("no_eps")
@pytest.mark.parametrize("method", ["dkd", "dist"])
def test_nothing_is_left_at_equality(method) -> None:
    teacher, _ = both()
    student = teacher._replace(logits_BC=teacher.logits_BC.detach() + 3.0)  # a constant changes no softmax
    assert build(method, taps())(teacher, student, LABELS, IDS).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("method", ["dkd", "dist"])
def test_extreme_logits_stay_finite(method) -> None:
    logits = torch.full((BATCH, CLASSES), -500.0)
    logits[torch.arange(BATCH), LABELS] = 500.0
    student = (-logits).requires_grad_()
    loss = build(method, taps())(Features(logits, {}, {}), Features(student, {}, {}), LABELS, IDS)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()
