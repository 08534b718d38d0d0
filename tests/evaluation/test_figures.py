"""The figures of an evaluation against their definitions, row by row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mimkd_ray.errors import UserError
from mimkd_ray.evaluation.cka import linear_cka
from mimkd_ray.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from mimkd_ray.evaluation.linear_probe import linear_probe_accuracy
from mimkd_ray.evaluation.predictions import (
    BINS,
    agreement,
    calibration,
    confusions,
    ece,
    fit_temperature,
    per_class,
    reliability,
    top_k,
)

CLASSES = ("ant", "bee", "cat", "dog")


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    """Logits and labels of 400 images, right more often than not, and too sure of it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (400,), generator=generator)
    logits = 4 * torch.randn(400, 4, generator=generator)
    logits[torch.arange(400), labels] += 4
    return logits, labels


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def test_accuracy_and_confusions(rows: tuple[Tensor, Tensor]) -> None:
    logits, labels = rows
    predicted = [max(range(4), key=row.__getitem__) for row in logits.tolist()]
    right = [guess == label for guess, label in zip(predicted, labels.tolist(), strict=True)]
    assert top_k(logits, labels, 1) == pytest.approx(100 * sum(right) / 400)
    two = [sorted(range(4), key=row.__getitem__)[-2:] for row in logits.tolist()]
    second = [label in best for best, label in zip(two, labels.tolist(), strict=True)]
    assert top_k(logits, labels, 2) == pytest.approx(100 * sum(second) / 400)
    assert top_k(logits, labels, 5) == 100
    found = {each["class"]: (each["rows"], each["top1"]) for each in per_class(logits.argmax(1), labels, CLASSES)}
    for number, name in enumerate(CLASSES):
        mine = [hit for hit, label in zip(right, labels.tolist(), strict=True) if label == number]
        assert found[name] == (len(mine), pytest.approx(100 * sum(mine) / len(mine)))
    pairs = [(label, guess) for label, guess in zip(labels.tolist(), predicted, strict=True) if label != guess]
    listed = confusions(logits.argmax(1), labels, CLASSES)
    assert [each["count"] for each in listed] == sorted((pairs.count(pair) for pair in set(pairs)), reverse=True)
    assert all(pairs.count((CLASSES.index(c["label"]), CLASSES.index(c["prediction"]))) == c["count"] for c in listed)


def test_a_class_without_images_is_not_listed() -> None:
    assert [each["class"] for each in per_class(torch.tensor([0, 3]), torch.tensor([0, 3]), CLASSES)] == ["ant", "dog"]


def test_calibration_error(rows: tuple[Tensor, Tensor]) -> None:
    logits, labels = rows
    sums = [[0, 0.0, 0] for _ in range(BINS)]
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        probabilities = softmax(row)
        confidence = max(probabilities)
        place = sums[math.ceil(confidence * BINS) - 1]
        place[0] += 1
        place[1] += confidence
        place[2] += probabilities.index(confidence) == label
    expected = sum(abs(total - hits) for _, total, hits in sums) / 400
    assert ece(reliability(logits, labels)) == pytest.approx(expected)


def test_the_temperature_has_the_least_cross_entropy(rows: tuple[Tensor, Tensor]) -> None:
    logits, labels = rows
    found = fit_temperature(logits, labels)

    def loss(temperature: float) -> float:
        scaled = (logits.double() / temperature).tolist()
        picked = [softmax(row)[label] for row, label in zip(scaled, labels.tolist(), strict=True)]
        return -sum(map(math.log, picked))

    assert found == pytest.approx(min((0.02 * step for step in range(20, 300)), key=loss), abs=0.02)
    made = calibration(logits, labels)
    assert made["ece_scaled"] < made["ece"]
    assert made["temperature"] == pytest.approx(found, rel=0.2)


def test_agreement(rows: tuple[Tensor, Tensor]) -> None:
    logits, _ = rows
    teacher = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    total, same = 0.0, 0
    for mine, its in zip(logits.double().tolist(), teacher.double().tolist(), strict=True):
        p, q = softmax(its), softmax(mine)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        same += p.index(max(p)) == q.index(max(q))
    found = agreement(logits, teacher)
    assert found == {"agreement": pytest.approx(same / 4), "kl": pytest.approx(total / 400)}


def test_cka_by_explicit_centring() -> None:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with Gram matrices and H = I - 1/n."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 7, generator=generator) + 3, torch.randn(40, 5, generator=generator)
    y[:, :3] += x[:, :3]
    centring = torch.eye(40, dtype=torch.float64) - 1 / 40
    k, gram = ((value.double() @ value.double().T) for value in (x, y))

    def hsic(a: Tensor, b: Tensor) -> float:
        return float(torch.trace(a @ centring @ b @ centring))

    assert linear_cka(x, y) == pytest.approx(hsic(k, gram) / math.sqrt(hsic(k, k) * hsic(gram, gram)))
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=generator))[0]
    assert linear_cka(x, 3 * x @ rotation) == pytest.approx(1, abs=1e-6)


def clusters(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.randn(3, 6, generator=torch.Generator().manual_seed(9))
    return centres[labels] + 0.8 * torch.randn(count, 6, generator=generator), labels


def test_linear_probe_is_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    (train, labels), (test, truth) = clusters(120, 2), clusters(60, 3)
    scaler = StandardScaler().fit(train.numpy())
    # Its C weighs the sum of losses against half the squared weights: C = 1 / (2 * l2 * rows).
    oracle = LogisticRegression(C=1 / (2 * 1e-3 * 120), max_iter=1000).fit(scaler.transform(train.numpy()), labels)
    expected = 100 * oracle.score(scaler.transform(test.numpy()), truth)
    assert linear_probe_accuracy(train, labels, test, truth) == pytest.approx(expected)


def test_features_without_rows() -> None:
    features, labels = clusters(6, 0)
    with pytest.raises(UserError, match="0 training features and 0 labels"):
        linear_probe_accuracy(features[:0], labels[:0], features, labels)
    with pytest.raises(UserError, match="6 test features and 5 labels"):
        linear_probe_accuracy(features, labels, features, labels[:5])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_are_harder_with_severity(name: str) -> None:
    steps = torch.linspace(40, 160, 32)
    image = (steps[:, None] + 30 * torch.sin(steps[None] / 3)).round().clamp(0, 255)
    images = image.to(torch.uint8).expand(2, 3, 32, 32).contiguous()
    distances = []
    for severity in SEVERITIES:
        found = CORRUPTIONS[name](images, severity)
        assert found.shape == images.shape
        assert found.dtype == torch.uint8
        assert torch.equal(found, CORRUPTIONS[name](images, severity))
        distances.append(float((found.float() - images.float()).square().mean()))
    assert distances == sorted(distances)
    assert distances[0] > 0
