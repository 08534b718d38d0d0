"""Numbers by seed alone are those that torch's generator gives, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimkd_ray.data.draws import NUMBERS, ONE, Draws, SeededDraws, Span, TorchDraws
from mimkd_ray.data.transforms import AREA, LOG_ASPECT, ResizedCropFlip

seeds = st.integers(0, 2**32 - 1)


def everything(draws: Draws) -> list[float]:
    """All kinds of numbers, in an order that mixes them."""
    found: list[float] = []
    for stop in (1, 2, 97, 2000):
        found += [draws.uniform(AREA), draws.exp_uniform(LOG_ASPECT), draws.below(stop), draws.uniform(ONE)]
    return found


@given(seed=seeds)
def test_they_are_those_of_torch(seed: int) -> None:
    torch.manual_seed(seed)
    expected = everything(TorchDraws())
    state = torch.get_rng_state()
    assert everything(SeededDraws(seed)) == expected
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator is left alone"


def test_torch_draws_are_those_of_tensors() -> None:
    torch.manual_seed(5)
    found = everything(TorchDraws())
    torch.manual_seed(5)
    expected: list[float] = []
    for stop in (1, 2, 97, 2000):
        expected.append(torch.empty(1).uniform_(0.08, 1.0).item())
        expected.append(torch.exp(torch.empty(1).uniform_(LOG_ASPECT.low, LOG_ASPECT.high)).item())
        expected += [torch.randint(0, stop, (1,)).item(), torch.rand(1).item()]
    assert found == expected


@given(seed=seeds, height=st.integers(1, 600), width=st.integers(1, 600))
def test_a_crop_by_seed_is_the_crop_after_that_seed(seed: int, height: int, width: int) -> None:
    """Long images as well, for which ten tries fail and all numbers are used."""
    transform = ResizedCropFlip(8)
    torch.manual_seed(seed)
    assert transform.draw(height, width, SeededDraws(seed)) == transform.draw(height, width)


def test_there_are_enough_for_ten_tries() -> None:
    draws = SeededDraws(1)
    for _ in range(NUMBERS):
        draws.uniform(ONE)
    with pytest.raises(StopIteration):
        draws.uniform(ONE)
    assert NUMBERS >= 10 * 2 + 2 + 1


def test_a_span_is_float32() -> None:
    assert Span.of(0.08, 1.0) == (0.07999999821186066, 1.0, 0.9200000166893005)
