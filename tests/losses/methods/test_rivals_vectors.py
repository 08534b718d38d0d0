"""CC, RKD and PKT against loops over pairs and triples of images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from rival_checks import BATCH, IDS, LABELS, Arrays, both, build, check, taps

from mimkd_ray.losses.features import Features

METHODS = ["cc", "rkd", "pkt"]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def slow_cc(teacher: Arrays, student: Arrays) -> float:
    def kernel(vector: np.ndarray, i: int, j: int) -> float:
        x = 2 * 0.4 * cosine(vector[i], vector[j])
        return math.exp(-0.8) * (1 + x + x * x / 2)

    pairs = [(i, j) for i in range(BATCH) for j in range(BATCH)]
    return sum((kernel(teacher.vector, i, j) - kernel(student.vector, i, j)) ** 2 for i, j in pairs) / BATCH**2


def huber(difference: float) -> float:
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def slow_rkd(teacher: Arrays, student: Arrays) -> float:
    def distances(vector: np.ndarray) -> np.ndarray:
        found = np.array([[np.linalg.norm(a - b) for b in vector] for a in vector])
        return found / found[found > 0].mean()

    def angle(vector: np.ndarray, i: int, j: int, k: int) -> float:
        if j in (i, k):
            return 0.0
        return cosine(vector[i] - vector[j], vector[k] - vector[j])

    d_t, d_s = distances(teacher.vector), distances(student.vector)
    images = range(BATCH)
    distance = sum(huber(d_s[i, j] - d_t[i, j]) for i in images for j in images) / BATCH**2
    angles = [
        huber(angle(student.vector, i, j, k) - angle(teacher.vector, i, j, k))
        for i in images
        for j in images
        for k in images
    ]
    return 25 * distance + 50 * sum(angles) / BATCH**3


def slow_pkt(teacher: Arrays, student: Arrays) -> float:
    def neighbours(vector: np.ndarray) -> np.ndarray:
        found = np.array([[(cosine(a, b) + 1) / 2 for b in vector] for a in vector])
        return found / found.sum(1, keepdims=True)

    q, p = neighbours(teacher.vector), neighbours(student.vector)
    total = 0.0
    for i in range(BATCH):
        for j in range(BATCH):
            total += q[i, j] * math.log((q[i, j] + 1e-7) / (p[i, j] + 1e-7))
    return total / BATCH**2


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("method", "reference"), [("cc", slow_cc), ("rkd", slow_rkd), ("pkt", slow_pkt)])
def test_against_loops(method, reference, seed: int) -> None:
    assert check(build(method, taps(vectors=True)), reference, *both(seed)) > 0


def of_vectors(method, teacher: torch.Tensor, student: torch.Tensor) -> float:
    none = torch.zeros(len(teacher), 2)
    rival = build(method, taps(vectors=True))
    return rival(Features(none, {"tv": teacher}, {}), Features(none, {"sv": student}, {}), LABELS, IDS).item()


@pytest.mark.parametrize("method", METHODS)
def test_a_rotated_and_scaled_teacher_is_matched_by_itself(method) -> None:
    teacher = both()[0].vectors["tv"]
    rotation = torch.linalg.qr(torch.randn(8, 6, dtype=torch.float64))[0]
    assert of_vectors(method, teacher, 3 * teacher @ rotation.T) == pytest.approx(0, abs=1e-9)
    assert of_vectors(method, teacher, teacher.flip(0)) > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_images_that_stand_twice_have_finite_gradients(method) -> None:
    """A damaged image is replaced by its neighbour, so that two rows of a lane may be equal."""
    teacher = both()[0].vectors["tv"][[0, 0, 1, 2, 3]]
    student = both()[1].vectors["sv"][[0, 0, 1, 2, 3]].requires_grad_()
    none = torch.zeros(BATCH, 2)
    loss = build(method, taps(vectors=True))(
        Features(none, {"tv": teacher}, {}), Features(none, {"sv": student}, {}), LABELS, IDS
    )
    loss.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0
