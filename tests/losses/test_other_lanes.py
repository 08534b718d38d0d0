"""Negatives from all lanes of the step, against a slow sum over single pairs."""

from __future__ import annotations

import math

import pytest
import torch

from mimkd_ray.config import CriticConfig, LossConfig
from mimkd_ray.config.loss_presets import Kind, SameClass
from mimkd_ray.losses.features import Features, Others
from mimkd_ray.losses.mimkd_loss import MIMKDLoss
from mimkd_ray.losses.terms import Term

B, M, CT, CS = 4, 7, 5, 3


LABELS, OTHER_LABELS = [0, 1, -1, 0], [0, 1, 2, 0, 3, -1, 1]
"""Class numbers of the lane and of the others; -1 is unknown."""


def _loss(kind: Kind, **fields) -> MIMKDLoss:
    torch.manual_seed(1)
    term = Term(kind=kind, teacher="t", student="s", weight=1.0, teacher_channels=CT, student_channels=CS)
    loss = MIMKDLoss(LossConfig(preset="two_sided", negatives="step", critic=CriticConfig(width=6), **fields), [term])
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return loss.double()


def _features(kind: Kind) -> tuple[Features, Features, torch.Tensor]:
    torch.manual_seed(2)
    shape = (2, 2)
    logits = torch.randn(B, 10).double()
    vectors, maps = torch.randn(B, CT).double(), torch.randn(B, CT, *shape).double()
    teacher = Features(logits, {"t": vectors}, {"t": maps})
    student = Features(logits, {"s": torch.randn(B, CS).double()}, {"s": torch.randn(B, CS, *shape).double()})
    return teacher, student, torch.tensor([10, 11, 12, 13])


def _others(ids: list[int]) -> Others:
    torch.manual_seed(3)
    return Others({"t": torch.randn(len(ids), CT).double()}, torch.tensor(ids), torch.tensor(OTHER_LABELS[: len(ids)]))


@pytest.mark.parametrize("same_class", ["keep", "leave_out"])
@pytest.mark.parametrize("kind", ["global", "local"])
def test_candidates_are_the_lane_and_the_others_without_equal_ids(kind: Kind, same_class: SameClass) -> None:
    """Nor those of the same class, if these are left out; an unknown class is no reason."""
    loss = _loss(kind, same_class=same_class)
    loss.labels = "partial"
    teacher, student, ids = _features(kind)
    other_ids = [20, 21, 12, 23, 10, 25, 26]  # two of them are in this lane
    others = _others(other_ids)
    output = loss(teacher._replace(others=others), student, torch.tensor(LABELS), ids)

    critic = loss.critics[0]
    candidates = torch.cat([teacher.vectors["t"], others.vectors["t"]])
    everyone, classes = ids.tolist() + other_ids, LABELS + OTHER_LABELS

    def is_negative(i: int, k: int) -> bool:
        same = same_class == "leave_out" and classes[i] == classes[k] != -1
        return everyone[i] != everyone[k] and not same

    locations = [student.vectors["s"]] if kind == "global" else list(student.maps["s"].flatten(2).unbind(2))
    total = 0.0
    for features_BC in locations:
        for i in range(B):
            scores = {
                k: critic.paired(
                    critic.embed_student(features_BC[i : i + 1])[None],
                    critic.embed_teacher(candidates[k : k + 1])[None],
                ).item()
                for k in range(B + M)
                if k == i or is_negative(i, k)
            }
            total += math.log(sum(map(math.exp, scores.values())) / len(scores)) - scores[i]
    name = loss.plan[0].name
    assert output.log[f"{name}/loss"].item() == pytest.approx(total / (B * len(locations)), rel=1e-10)
    counts = [sum(is_negative(i, k) for k in range(B + M)) for i in range(B)]
    expected = sum(math.log(count + 1) for count in counts) / B
    assert output.log[f"{name}/ceiling"].item() == pytest.approx(expected, rel=1e-6)


def test_terms_of_maps_keep_to_the_lane() -> None:
    loss = _loss("feature")
    teacher, student, ids = _features("feature")
    labels = torch.zeros(B, dtype=torch.int64)
    without = loss(teacher, student, labels, ids).log["loss"]
    assert torch.equal(loss(teacher._replace(others=_others([1, 2])), student, labels, ids).log["loss"], without)


def test_class_probabilities_serve_as_labels() -> None:
    loss = _loss("global")
    teacher, student, ids = _features("global")
    probabilities = torch.rand(B, 10).double().softmax(1)
    expected = -(probabilities * student.logits_BC.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss(teacher, student, probabilities, ids).log["ce"], expected)
