"""The scored locations: every one equally often, and in expectation the loss over all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimkd_ray.config import CriticConfig, LossConfig
from mimkd_ray.errors import UserError
from mimkd_ray.losses import locations
from mimkd_ray.losses.features import Features
from mimkd_ray.losses.locations import draw_locations, even, to_locations
from mimkd_ray.losses.mimkd_loss import MIMKDLoss
from mimkd_ray.losses.terms import Term

sizes = st.integers(1, 40)


@given(size=sizes, count=sizes)
def test_every_position_is_as_likely_as_any_other(size: int, count: int) -> None:
    """Over phases in equal steps, against count / size of them."""
    count = min(count, size)
    phases = (torch.arange(size * 8) + 0.5) / (size * 8)
    found = torch.stack([even(phase, count, size) for phase in phases])
    assert (found.diff(dim=1) > 0).all(), "each at most once"
    seen = torch.bincount(found.flatten(), minlength=size)
    assert len(seen) == size
    assert (seen - 8 * count).abs().max() <= 1, seen


def test_a_phase_next_to_one_stays_on_the_map() -> None:
    almost = torch.tensor(1.0).nextafter(torch.tensor(0.0))
    assert all(int(even(almost, count, size)[-1]) < size for size in range(1, 300) for count in range(1, size + 1))


@given(height=sizes, width=sizes, limit=st.integers(0, 200))
def test_a_grid_has_at_most_the_limit_and_most_of_it(height: int, width: int, limit: int) -> None:
    where = draw_locations(torch.empty(1, 1, height, width), limit)
    if where is None:
        assert limit == 0 or height * width <= limit
        return
    rows, columns = len(where.rows_R), len(where.columns_S)
    assert rows <= height
    assert columns <= width
    assert limit / 2 < rows * columns <= limit
    if min(height, width) ** 2 >= limit >= 16:  # a square grid fits
        # Rounding a root down to a whole number of rows may halve it.
        assert 0.25 < (height / rows) / (width / columns) < 4, "about as dense along either side"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_locations_of_a_map(layout: torch.memory_format) -> None:
    feature_BCHW = torch.randn(2, 3, 4, 5).to(memory_format=layout)
    everywhere_LBC = to_locations(feature_BCHW)
    assert everywhere_LBC.data_ptr() == feature_BCHW.data_ptr()
    where = locations.Locations(torch.tensor([0, 3]), torch.tensor([1, 2, 4]))
    expected = [feature_BCHW[:, :, h, w] for h in (0, 3) for w in (1, 2, 4)]
    assert torch.equal(to_locations(feature_BCHW, where), torch.stack(expected))
    assert torch.equal(everywhere_LBC, torch.stack([feature_BCHW[:, :, h, w] for h in range(4) for w in range(5)]))
    assert torch.equal(to_locations(feature_BCHW[:, :, 0, 0])[0], feature_BCHW[:, :, 0, 0])


TERMS = (
    Term(kind="local", teacher="pool", student="map", weight=0.4, teacher_channels=5, student_channels=3),
    Term(kind="feature", teacher="map", student="map", weight=1.0, teacher_channels=6, student_channels=3),
)


def make(limit: int | None, bound: str = "infonce") -> tuple[MIMKDLoss, Features, Features]:
    """A loss in float64 with a local and a feature term of 4x6 maps (the teacher's is larger)."""
    torch.manual_seed(0)
    config = LossConfig(preset="two_sided", locations=limit, bound=bound, critic=CriticConfig(width=4))  # type: ignore[arg-type]
    loss = MIMKDLoss(config, TERMS).double()
    draw = torch.Generator().manual_seed(1)
    teacher, student = (
        Features(
            torch.randn(4, 5, generator=draw, dtype=torch.float64),
            {"pool": torch.randn(4, 5, generator=draw, dtype=torch.float64)},
            {"map": torch.randn(4, channels, *size, generator=draw, dtype=torch.float64)},
        )
        for channels, size in ((6, (8, 6)), (3, (4, 6)))
    )
    return loss, teacher, student


def value_and_gradient(limit: int, bound: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    loss, teacher, student = make(limit, bound)
    student_map = student.maps["map"].requires_grad_()
    output = loss(teacher, student, torch.arange(4), torch.arange(4))
    output.total.backward()
    assert student_map.grad is not None
    return {name: part.detach() for name, part in output.terms.items()}, student_map.grad


@pytest.mark.parametrize("bound", ["infonce", "jsd"])
def test_in_expectation_the_loss_is_that_over_all_locations(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 2x3 grid on a 4x6 map lies in one of four places: the mean over them, against all 24 locations."""
    everywhere, gradient_everywhere = value_and_gradient(0, bound)
    found = []
    for phase in ((0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)):
        monkeypatch.setattr(locations.torch, "rand", lambda size, device, phase=phase: torch.tensor(phase))
        found.append(value_and_gradient(6, bound))
    assert len({float(parts["feature/map-map"]) for parts, _ in found}) == 4
    for name, value in everywhere.items():
        torch.testing.assert_close(torch.stack([parts[name] for parts, _ in found]).mean(), value)
    torch.testing.assert_close(torch.stack([gradient for _, gradient in found]).mean(0), gradient_everywhere)


def test_the_draw_is_a_function_of_the_seed_and_a_reading_has_none() -> None:
    loss, teacher, student = make(6)

    def total(seed: int, reading: bool = False) -> float:
        torch.manual_seed(seed)
        return float(loss(teacher, student, torch.arange(4), torch.arange(4), reading).total.detach())

    assert total(1) == total(1)
    assert len({total(seed) for seed in range(8)}) > 1
    assert total(1, reading=True) == total(2, reading=True)
    everywhere, *features = make(0)
    assert total(1, reading=True) == pytest.approx(
        float(everywhere(*features, torch.arange(4), torch.arange(4)).total.detach())
    )


def test_presets_and_wrong_values() -> None:
    assert LossConfig().resolved_locations == 64
    assert LossConfig(preset="paper").resolved_locations == 0
    assert LossConfig(preset="paper", locations=9).resolved_locations == 9
    with pytest.raises(UserError, match="locations is -1: give 0 or more"):
        LossConfig(locations=-1)
