"""The concat critic: tasks of known mutual information, and the running statistics of its features."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mimkd_ray.config import CriticConfig, LossConfig
from mimkd_ray.losses.critic_sides import Standardised
from mimkd_ray.losses.features import Features
from mimkd_ray.losses.mimkd_loss import MIMKDLoss
from mimkd_ray.losses.terms import Term

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
"""(count, generator) -> teacher and student vectors."""

RHO = 0.8
GAUSSIAN_NATS = -0.5 * math.log(1 - RHO**2)
KEPT = 0.685
"""Of the sparse task: share of the students' states that are the teacher's own."""


def gaussian(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One channel a side, of correlation 0.8: all that there is to see is a number's size and sign."""
    x, noise = torch.randn(2, count, 1, generator=generator)
    return x, RHO * x + math.sqrt(1 - RHO**2) * noise


def sparse(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of three channels one is on, at one of three strengths. The student's state is the teacher's, or any other."""
    state = torch.randint(9, (count,), generator=generator)
    other = torch.randint(9, (count,), generator=generator)
    kept = torch.rand(count, generator=generator) < KEPT
    states = state, torch.where(kept, state, other)
    teacher, student = (
        torch.nn.functional.one_hot(each % 3, 3) * (1.0 + each.div(3, rounding_mode="floor")).unsqueeze(1)
        for each in states
    )
    return teacher, student


def sparse_nats(states: int) -> float:
    """Mutual information of `states` equal states of which KEPT are kept and the others drawn anew."""
    same, other = KEPT + (1 - KEPT) / states, (1 - KEPT) / states
    return math.log(states) + same * math.log(same) + (states - 1) * other * math.log(other)


def critic_loss(channels: int, **fields) -> MIMKDLoss:
    term = Term(
        kind="global", teacher="t", student="s", weight=1.0, teacher_channels=channels, student_channels=channels
    )
    config = LossConfig(preset="two_sided", **{"critic": CriticConfig(kind="concat", width=32)} | fields)
    return MIMKDLoss(config, [term])


def lane(teacher: Tensor, student: Tensor) -> tuple[Features, Features, Tensor, Tensor]:
    rows = len(teacher)
    return (
        Features(torch.zeros(rows, 2), {"t": teacher}, {}),
        Features(torch.zeros(rows, 2), {"s": student}, {}),
        torch.zeros(rows, dtype=torch.int64),
        torch.arange(rows),
    )


def read(draw: Draw, lr: float = 0.02, steps: int = 300) -> float:
    """Nats that a critic reads of new draws, once it is trained."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    loss = critic_loss(draw(2, generator)[0].shape[1])
    optimizer = torch.optim.SGD(loss.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        own = lane(*draw(64, generator))
        output = loss(*own)
        optimizer.zero_grad()
        output.total.backward()
        optimizer.step()
        loss.observe(own[0], own[2], own[3])
        loss.after_step()
    with torch.no_grad():
        held_out = [loss(*lane(*draw(64, generator)), reading=True).log["global/t-s/nats"].item() for _ in range(80)]
    return sum(held_out) / len(held_out)


def test_the_size_of_a_single_channel_is_seen() -> None:
    assert pytest.approx(0.511, abs=1e-3) == GAUSSIAN_NATS
    assert 0.45 < read(gaussian) < GAUSSIAN_NATS + 0.03


def test_the_strength_of_a_sparse_channel_is_seen() -> None:
    """After a LayerNorm such features only show their active channel, which gives 0.44 of 1.02 nats."""
    assert sparse_nats(9) == pytest.approx(1.02, abs=0.01)
    assert sparse_nats(3) == pytest.approx(0.44, abs=0.01)
    assert 0.9 < read(sparse) < sparse_nats(9) + 0.03


@pytest.mark.parametrize(("scale", "mean"), [(100.0, 50.0), (0.01, 3.0)])
def test_features_of_any_scale_and_mean_train(scale: float, mean: float) -> None:
    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        teacher, student = gaussian(count, generator)
        return mean + scale * teacher, mean + scale * student

    assert 0.45 < read(draw) < GAUSSIAN_NATS + 0.03


def test_statistics_are_those_of_all_lanes_of_the_steps_before() -> None:
    """Two lanes a step: first the lane's own, then the mean over the steps of the mean over their lanes."""
    loss = critic_loss(3).double()
    generator = torch.Generator().manual_seed(2)
    standard = loss.critics[0].standard
    seen: list[list[Tensor]] = []
    for step in range(3):
        lanes = [torch.randn(2, 8, 3, generator=generator, dtype=torch.float64) * 7 + step for _ in range(2)]
        for teacher, student in lanes:
            own = lane(teacher, student)
            for who, feature in enumerate((teacher, student)):
                mean, variance = feature.mean(0), feature.var(0)
                if step:
                    parts = [[each[who].mean(0), each[who].var(0)] for at in seen for each in at]
                    mean, variance = (sum(column) / len(parts) for column in zip(*parts, strict=True))
                expected = (feature - mean) / (variance + 1e-5).sqrt()
                torch.testing.assert_close(standard[who](feature.unsqueeze(0))[0], expected, rtol=1e-9, atol=1e-9)
            loss(*own)
            loss(*own, reading=True)  # an evaluation leaves no trace
            loss.observe(own[0], own[2], own[3])
        seen.append(lanes)  # type: ignore[arg-type]
        loss.after_step()


def test_any_deal_of_lanes_to_workers_gives_the_same_statistics() -> None:
    """Three lanes: one worker, or one with two lanes and one with one, whose rows the gather puts together."""
    generator = torch.Generator().manual_seed(3)
    lanes = [lane(*torch.randn(2, 8, 3, generator=generator).double()) for _ in range(3)]

    def worker(numbers: list[int]) -> MIMKDLoss:
        torch.manual_seed(0)
        loss = critic_loss(3).double()
        for number in numbers:
            own = lanes[number]
            loss(*own)
            loss.observe(own[0], own[2], own[3])
        return loss

    alone = worker([0, 1, 2])
    alone.after_step()
    rows: list[Tensor] = []
    first, second = worker([0, 2]), worker([1])
    first.after_step(lambda own: rows.append(own) or own)  # type: ignore[func-returns-value]
    gathered = torch.cat([rows[0][:1], torch.zeros_like(rows[0][:1]), rows[0][1:]])

    def gather(own: Tensor) -> Tensor:
        gathered[1] = own[0]
        return gathered

    second.after_step(gather)
    for mine, reference in zip(second.critics[0].standard, alone.critics[0].standard, strict=True):
        torch.testing.assert_close(mine.moments_2C, reference.moments_2C, rtol=1e-12, atol=1e-12)
    assert "sums_2C" not in dict(alone.critics[0].standard[0].state_dict())


def test_statistics_follow_features_that_move() -> None:
    standard = Standardised(1)
    for step in range(1000):
        standard.update(torch.tensor([0.0 if step < 500 else 10.0, 4.0]))
    assert standard.moments_2C[0].item() == pytest.approx(10 * (1 - 0.99**500), rel=1e-3)
    assert standard(torch.full((1, 4, 1), 12.0)).mean().item() == pytest.approx((12 - 9.93) / 2, abs=0.02)


def test_negatives_of_others_have_no_part_in_the_statistics() -> None:
    standard = Standardised(2)
    feature = torch.randn(1, 6, 2)
    joined = torch.cat([feature, torch.full((1, 9, 2), 1e3)], dim=1)
    torch.testing.assert_close(standard(joined, 6)[:, :6], standard(feature))
