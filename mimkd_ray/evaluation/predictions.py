"""Figures of a network's logits: accuracy by class, confusions, calibration, agreement with another network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 15
"""Bins of confidence, of equal width (Guo et al. 2017)."""
WORST = 20
"""Confusions that are listed."""


def top_k(logits_NV: Tensor, labels_N: Tensor, k: int) -> float:
    """Return the share of rows (%) whose label is among the k largest logits; of k classes and fewer it is 100."""
    best_NK = logits_NV.topk(min(k, logits_NV.shape[1]), dim=1).indices
    return 100 * float((best_NK == labels_N.unsqueeze(1)).any(dim=1).double().mean())


def per_class(predicted_N: Tensor, labels_N: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return class, rows and top-1 (%) of each class that has rows, in the order of the classes."""
    rows_V = torch.bincount(labels_N, minlength=len(classes))
    right_V = torch.bincount(labels_N[predicted_N == labels_N], minlength=len(classes))
    return [
        {"class": name, "rows": int(rows), "top1": 100 * int(right) / int(rows)}
        for name, rows, right in zip(classes, rows_V, right_V, strict=True)
        if rows
    ]


def confusions(predicted_N: Tensor, labels_N: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the most frequent pairs of a label and another prediction, at most WORST."""
    wrong = predicted_N != labels_N
    pairs, counts = torch.unique(torch.stack([labels_N[wrong], predicted_N[wrong]], 1), dim=0, return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:WORST]
    return [
        {"label": classes[int(pairs[row, 0])], "prediction": classes[int(pairs[row, 1])], "count": int(counts[row])}
        for row in order
    ]


def calibration(logits_NV: Tensor, labels_N: Tensor, held_out: tuple[Tensor, Tensor] | None = None) -> dict[str, Any]:
    """Return the expected calibration error as it is and with a fitted temperature, the temperature, and the bins.

    The temperature is fitted on the logits and labels `held_out`; without them that of each half of the rows (even and
    odd positions) on the other half, so that no row is scaled by what was fitted on it, and `temperature` is their
    mean. `bins` has {low, high, rows, confidence, accuracy} as it is.
    """
    if held_out is not None:
        temperatures = [fit_temperature(*held_out)]
        scaled_NV = logits_NV.double() / temperatures[0]
    else:
        halves = [torch.arange(start, len(labels_N), 2, device=labels_N.device) for start in (0, 1)]
        temperatures = [fit_temperature(logits_NV[rows], labels_N[rows]) for rows in halves]
        scaled_NV = logits_NV.double().clone()
        for rows, temperature in zip(halves, reversed(temperatures), strict=True):
            scaled_NV[rows] /= temperature
    bins = reliability(logits_NV, labels_N)
    return {
        "ece": ece(bins),
        "ece_scaled": ece(reliability(scaled_NV, labels_N)),
        "temperature": sum(temperatures) / len(temperatures),
        "bins": bins,
    }


def reliability(logits_NV: Tensor, labels_N: Tensor) -> list[dict[str, float]]:
    """Return the bins of confidence that have rows: {low, high, rows, confidence, accuracy}, shares from 0 to 1."""
    confidence_N, predicted_N = F.softmax(logits_NV.double(), dim=1).max(dim=1)
    bin_N = (confidence_N * BINS).ceil().clamp(1, BINS) - 1  # (low, high]
    found = []
    for number in range(BINS):
        rows = bin_N == number
        if rows.any():
            found.append(
                {
                    "low": number / BINS,
                    "high": (number + 1) / BINS,
                    "rows": int(rows.sum()),
                    "confidence": float(confidence_N[rows].mean()),
                    "accuracy": float((predicted_N == labels_N)[rows].double().mean()),
                }
            )
    return found


def ece(bins: Sequence[dict[str, float]]) -> float:
    """Return the expected calibration error: the mean distance of confidence and accuracy, by the bins' rows."""
    rows = sum(each["rows"] for each in bins)
    return sum(each["rows"] * abs(each["confidence"] - each["accuracy"]) for each in bins) / rows


def fit_temperature(logits_NV: Tensor, labels_N: Tensor) -> float:
    """Return the temperature, from 0.05 to 20, with the least cross-entropy of logits / temperature.

    Cross-entropy is convex in 1 / temperature, so golden-section search over it finds the least.
    """
    logits_NV = logits_NV.double()

    def loss(beta: float) -> float:
        return float(F.cross_entropy(logits_NV * beta, labels_N))

    low, high, ratio = 0.05, 20.0, (math.sqrt(5) - 1) / 2
    while high - low > 1e-5:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return 2 / (low + high)


def agreement(student_NV: Tensor, teacher_NV: Tensor) -> dict[str, float]:
    """Return the share of rows (%) with the same prediction, and the mean KL(teacher || student) in nats."""
    student_log, teacher_log = F.log_softmax(student_NV.double(), dim=1), F.log_softmax(teacher_NV.double(), dim=1)
    same = (student_NV.argmax(dim=1) == teacher_NV.argmax(dim=1)).double().mean()
    return {
        "agreement": 100 * float(same),
        "kl": float(F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)),
    }
