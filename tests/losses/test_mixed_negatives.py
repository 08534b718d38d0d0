"""The one rolled negative of images that are mixed: it shares nothing with the image."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mimkd_ray.config import CriticConfig, LossConfig, MixConfig
from mimkd_ray.data.augment.mixing import draw_mix, mix
from mimkd_ray.losses.features import Features
from mimkd_ray.losses.mimkd_loss import MIMKDLoss
from mimkd_ray.losses.negatives import valid_pairs
from mimkd_ray.losses.terms import Term

TERM = Term(kind="global", teacher="t", student="s", weight=1.0, teacher_channels=6, student_channels=5)


def mixed_lane(size: int, kind: str) -> tuple[Tensor, Tensor]:
    """Return each image's share of every image, (size, size), from images that are 1 in a channel each; and the
    labels."""
    config = MixConfig(**{f"{kind}_alpha": 1.0})
    images, labels = torch.eye(size)[:, :, None, None].expand(-1, -1, 8, 8), torch.arange(size)
    for step in range(20):
        mixed, labels_BC = mix(images, labels, size, draw_mix(config, 0, step, 0, *images.shape[2:]))
        if ((labels_BC > 0.1).sum(1) == 2).all():
            return mixed.mean((2, 3)), labels_BC
    raise AssertionError("nothing was mixed")


def lane(size: int, labels_BC: Tensor) -> tuple[Features, Features, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    teacher = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    student = torch.randn(size, 5, generator=generator, dtype=torch.float64).requires_grad_()
    logits = torch.zeros(size, labels_BC.shape[-1], dtype=torch.float64)
    return Features(logits, {"t": teacher}, {}), Features(logits, {"s": student}, {}), labels_BC, torch.arange(size)


def paper_loss(**fields) -> MIMKDLoss:
    torch.manual_seed(0)
    critic = CriticConfig(width=4, temperature=0.5)
    return MIMKDLoss(LossConfig(preset="paper", critic=critic, **fields), [TERM]).double()


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_an_image_and_its_negative_share_nothing(size: int, kind: str) -> None:
    """The negatives are found by their influence: teacher k is one of image i if the gradient of i's student moves with
    it."""
    shares_BB, labels_BC = mixed_lane(size, kind)
    loss = paper_loss(ce_weight=0.0)
    teacher, student, _, ids = lane(size, labels_BC)

    def gradient(teachers: Tensor) -> Tensor:
        output = loss(teacher._replace(vectors={"t": teachers}), student, labels_BC, ids)
        (found,) = torch.autograd.grad(output.total, student.vectors["s"])
        return found

    start = gradient(teacher.vectors["t"])
    found = []
    for k in range(size):
        moved = teacher.vectors["t"].clone()
        moved[k] += torch.arange(6.0, dtype=torch.float64)
        changed = (gradient(moved) - start).abs().sum(1) > 1e-12
        found += [(i, k) for i in range(size) if changed[i] and i != k]
    for i, k in found:
        assert (shares_BB[i] * shares_BB[k]).sum() == 0, (i, k)
    assert len(found) == (size if size > 3 else 0)


@pytest.mark.parametrize("bound", ["jsd", "infonce"])
def test_the_loss_of_mixed_images_equals_a_loop(bound) -> None:
    _, labels_BC = mixed_lane(6, "mixup")
    loss = paper_loss(bound=bound)
    teacher, student, labels_BC, ids = lane(6, labels_BC)
    got = loss(teacher, student, labels_BC, ids).log[f"{TERM.name}/loss"].item()
    critic = loss.critics[0]
    t, s = (
        torch.nn.functional.normalize(side(value), dim=-1)
        for side, value in ((critic.teacher, teacher.vectors["t"]), (critic.student, student.vectors["s"]))
    )
    scores = (s @ t.T * critic.log_scale.exp() + critic.bias).tolist()
    expected = 0.0
    for i in range(6):
        u, v = scores[i][i], scores[i][i - 2]
        if bound == "jsd":
            expected += (math.log(1 + math.exp(-u)) + math.log(1 + math.exp(v))) / 6
        else:
            expected -= (u - math.log((math.exp(u) + math.exp(v)) / 2)) / 6
    assert got == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("size", [2, 3])
def test_a_lane_without_a_negative_has_loss_0_and_no_reading(size: int) -> None:
    _, labels_BC = mixed_lane(size, "mixup")
    loss = paper_loss(ce_weight=0.0)
    output = loss(*lane(size, labels_BC))
    assert output.total.item() == 0
    assert math.isnan(output.log[f"{TERM.name}/nats"].item())
    output.total.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in loss.parameters())


def test_images_that_are_not_mixed_keep_the_one_before() -> None:
    assert valid_pairs(torch.tensor([1, 2, 2, 3]), "rolled").tolist() == [[True], [True], [False], [True]]
    assert valid_pairs(torch.tensor([1, 2, 1, 3]), "rolled", mixed=True).tolist() == [[False], [True], [False], [True]]
    assert valid_pairs(torch.arange(2), "rolled").all()
