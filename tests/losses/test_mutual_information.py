"""`mutual_information` against the closed form of Gaussians."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mimkd_ray.config.loss_presets import BoundName
from mimkd_ray.errors import UserError
from mimkd_ray.losses.mutual_information import mutual_information


def gaussians(nats: float, channels: int = 1, *, count: int) -> tuple[Tensor, Tensor]:
    """Pairs with I = -channels/2 ln(1 - rho^2) nats. Neither side has the mean 0 and the deviation 1."""
    rho = math.sqrt(1 - math.exp(-2 * nats / channels))
    generator = torch.Generator().manual_seed(1)
    x_NC, noise_NC = torch.randn(2, count, channels, generator=generator)
    return 30 * x_NC - 7, 0.01 * (rho * x_NC + math.sqrt(1 - rho**2) * noise_NC) + 2


@pytest.mark.parametrize(("bound", "channels", "nats"), [("infonce", 1, 2.0), ("dv", 3, 2.0)])
def test_gaussians_read_what_they_share(bound: BoundName, channels: int, nats: float) -> None:
    found = mutual_information(*gaussians(nats, channels, count=10_000), bound, epochs=8)
    assert found.nats == pytest.approx(nats, rel=0.1)
    assert 0 < found.standard_error < 0.1
    assert len(found.curve) == 8
    assert found.ceiling == (pytest.approx(math.log(256)) if bound == "infonce" else math.inf)


@pytest.mark.parametrize("bound", ["infonce", "jsd", "dv", "nwj", "smile"])
def test_independent_samples_read_nothing(bound: BoundName) -> None:
    x, _ = gaussians(1.0, count=6000)
    y = torch.randn(6000, 2, generator=torch.Generator().manual_seed(2))
    assert abs(mutual_information(x, y, bound, epochs=3).nats) < 0.03


def test_a_seed_gives_one_estimate_and_leaves_torchs_numbers_alone() -> None:
    x, y = gaussians(1.0, count=1200)
    state = torch.get_rng_state()
    first = mutual_information(x, y, epochs=2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert mutual_information(x, y.flatten(), epochs=2, seed=3) == first
    assert mutual_information(x, y, epochs=2, seed=4) != first


def test_the_callers_modes_and_large_offsets_change_nothing() -> None:
    x, y = gaussians(1.0, count=600)
    plain = mutual_information(x.double(), y, epochs=1, batch=64)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            assert mutual_information(x.double(), y, epochs=1, batch=64) == plain
    offset = mutual_information(x.double() + 1e9, y, epochs=1, batch=64)  # of which float32 has nothing but the offset
    assert offset.nats == pytest.approx(plain.nats, abs=1e-3)


def test_few_held_out_pairs_are_one_batch_without_an_error() -> None:
    found = mutual_information(*gaussians(1.0, count=400), epochs=2, held_out=0.1)
    assert math.isnan(found.standard_error)
    assert found.ceiling == pytest.approx(math.log(20))


X, Y = gaussians(1.0, count=400)


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (X, Y, {"bound": "infonc"}, "did you mean 'infonce'"),
        (X, Y[1:], {}, r"\(400, 1\) and y \(399, 1\)"),
        (X[None], Y[None], {}, r"give \(N, C\) and \(N, D\)"),
        (X, torch.where(torch.arange(400)[:, None] == 7, torch.inf, Y), {}, "y has numbers that are not finite"),
        (X[:40], Y[:40], {}, "40 pairs with held_out 0.25 leave 30"),
        (X, Y, {"held_out": 1.0}, "held_out is 1.0"),
        (X, Y, {"epochs": 0}, "epochs 0"),
    ],
)
def test_what_cannot_be_estimated(x: Tensor, y: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mutual_information(x, y, **options)
