"""Bounds against slow loops in float64, closed forms of Gaussian pairs, and the traps of their readings."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mimkd_ray.losses.bounds import BOUNDS, NWJ_LINEAR_FROM, NWJ_READ_TO, SMILE_CLIP, ceiling
from mimkd_ray.losses.negatives import valid_pairs

NAMES = sorted(BOUNDS)
FORMULAE = re.compile(r"((?:^    (?:infonce|jsd|dv|nwj|smile) .*\n)+)", re.MULTILINE)
RHO = 0.8
TRUTH = -0.5 * math.log(1 - RHO**2)


def log_mean_exp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values) / len(values))


def softplus(value: float) -> float:
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def slow_bound(name: str, positive, negative, valid) -> tuple[float, float]:
    """(loss, nats) of one location: the definitions of the table in bounds.py, pair by pair."""
    u = [float(value) for value in positive]
    rows = [
        [float(v) for v, ok in zip(row, mask, strict=True) if ok] for row, mask in zip(negative, valid, strict=True)
    ]
    v = [value for row in rows for value in row]
    mean_u = sum(u) / len(u)
    if name in ("jsd", "smile"):
        loss = sum(softplus(-value) for value in u) / len(u) + (sum(map(softplus, v)) / len(v) if v else 0.0)
        read = v if name == "jsd" else [min(max(value, -SMILE_CLIP), SMILE_CLIP) for value in v]
        return loss, mean_u - (log_mean_exp(read) if read else 0.0)
    if name == "dv":
        nats = mean_u - (log_mean_exp(v) if v else 0.0)
    elif name == "nwj":
        nats = mean_u - (sum(math.exp(value - 1) for value in v) / len(v) if v else 0.0)
    else:
        nats = sum(value - log_mean_exp([value, *row]) for value, row in zip(u, rows, strict=True)) / len(u)
    return -nats, nats


def some_valid(kind: str, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Masks: all other images, one negative each, equal ids left out, and scattered holes with one empty row."""
    if kind == "rolled":
        return valid_pairs(torch.arange(batch), "rolled")
    if kind == "equal ids":
        return valid_pairs(torch.arange(batch) // 2, "all")
    valid = valid_pairs(torch.arange(batch), "all")
    if kind == "holes":
        valid &= torch.rand(batch, batch, generator=generator) < 0.6
        valid[1] = False
    return valid


@pytest.mark.parametrize("mask", ["all", "rolled", "equal ids", "holes"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_nats_equal_slow_loops_at_every_location(name, mask):
    generator = torch.Generator().manual_seed(3)
    locations, batch = 3, 6
    valid = some_valid(mask, batch, generator)
    positive = 3 * torch.randn(locations, batch, generator=generator, dtype=torch.float64)
    negative = 3 * torch.randn(locations, batch, valid.shape[1], generator=generator, dtype=torch.float64)
    value = BOUNDS[name](positive, negative, valid)
    expected = [slow_bound(name, positive[i], negative[i], valid) for i in range(locations)]
    assert value.loss_L.tolist() == pytest.approx([loss for loss, _ in expected], rel=1e-12)
    assert value.nats_L.tolist() == pytest.approx([nats for _, nats in expected], rel=1e-12)
    single = BOUNDS[name](positive.float(), negative.float(), valid)
    assert single.loss_L.tolist() == pytest.approx([loss for loss, _ in expected], rel=1e-5)


@pytest.fixture(scope="module")
def gaussian_scores():
    """log r of 400 pairs of correlation 0.8 with every y of the same draw, 30 draws as locations."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 30, 400, generator=generator, dtype=torch.float64).unbind()
    y = RHO * x + math.sqrt(1 - RHO**2) * noise
    left, right = x.unsqueeze(2), y.unsqueeze(1)
    squares = (RHO * left) ** 2 - 2 * RHO * left * right + (RHO * right) ** 2
    log_ratio = TRUTH - squares / (2 * (1 - RHO**2))
    return log_ratio.diagonal(dim1=1, dim2=2), log_ratio, valid_pairs(torch.arange(400), "all")


@pytest.mark.parametrize(
    ("name", "shift"),
    [
        ("jsd", 0.0),
        ("smile", 0.0),
        ("dv", 0.0),
        ("dv", 3.0),
        ("nwj", 1.0),
        ("infonce", 0.0),
        ("infonce", -2.0),
    ],
)
def test_optimal_critic_reads_the_closed_form(gaussian_scores, name, shift):
    positive, negative, valid = gaussian_scores
    nats = BOUNDS[name](positive + shift, negative + shift, valid).nats_L.mean().item()
    assert nats == pytest.approx(TRUTH, rel=0.03)


def test_infonce_ignores_a_shift_per_student(gaussian_scores):
    positive, negative, valid = gaussian_scores
    shift = torch.randn(positive.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    nats = BOUNDS["infonce"](positive + shift, negative + shift.unsqueeze(1), valid).nats_L.mean().item()
    assert nats == pytest.approx(TRUTH, rel=0.03)


def test_nwj_of_an_unshifted_log_ratio_is_the_known_wrong_reading(gaussian_scores):
    """nwj(log r) is E[log r] - 1/e = 0.143: why a JSD critic is read by DV and never by NWJ."""
    positive, negative, valid = gaussian_scores
    wrong = BOUNDS["nwj"](positive, negative, valid).nats_L.mean().item()
    assert wrong == pytest.approx(TRUTH - math.exp(-1), abs=0.02)
    for name in ("jsd", "smile"):
        assert BOUNDS[name](positive, negative, valid).nats_L.mean().item() > 0.48


def test_jsd_objective_is_not_nats(gaussian_scores):
    """At its optimum the objective is twice the JS divergence less 2 ln 2, so it lies in [-2 ln 2, 0]."""
    positive, negative, valid = gaussian_scores
    objective = -BOUNDS["jsd"](positive, negative, valid).loss_L.mean().item()
    assert -2 * math.log(2) < objective < 0
    independent = -BOUNDS["jsd"](torch.zeros(1, 8), torch.zeros(1, 8, 8), valid[:8, :8]).loss_L.item()
    assert independent == pytest.approx(-2 * math.log(2))
    # No shift or scale of the optimal critic does better on these samples (up to sampling noise).
    for scale, shift in ((1.0, 0.3), (1.0, -0.3), (1.3, 0.0), (0.7, 0.0)):
        other = BOUNDS["jsd"](scale * positive + shift, scale * negative + shift, valid).loss_L.mean().item()
        assert -other < objective


@settings(max_examples=60)
@given(
    batch=st.integers(2, 7),
    scale=st.sampled_from([0.1, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 2**16),
    groups=st.integers(1, 7),
    rolled=st.booleans(),
)
def test_infonce_never_exceeds_its_ceiling(batch, scale, seed, groups, rolled):
    generator = torch.Generator().manual_seed(seed)
    valid = valid_pairs(torch.arange(batch) % groups, "rolled" if rolled else "all")
    positive = scale * torch.randn(2, batch, generator=generator)
    negative = scale * torch.randn(2, batch, valid.shape[1], generator=generator)
    value = BOUNDS["infonce"](positive, negative, valid)
    limit = ceiling("infonce", valid)
    assert limit.item() == pytest.approx(sum(math.log(1 + int(row.sum())) for row in valid) / batch, rel=1e-5)
    assert (value.nats_L <= limit + 1e-5).all()


def test_ceilings():
    assert ceiling("infonce", valid_pairs(torch.arange(128), "all")).item() == pytest.approx(math.log(128))
    assert ceiling("infonce", valid_pairs(torch.arange(128), "rolled")).item() == pytest.approx(math.log(2))
    for name in NAMES:
        if name != "infonce":
            assert ceiling(name, valid_pairs(torch.arange(4), "all")).item() == math.inf


@pytest.mark.parametrize("magnitude", [50.0, 100.0, 1e4])
@pytest.mark.parametrize("mask", ["all", "rolled", "equal ids", "holes", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_finite_in_float32(name, mask, magnitude):
    valid = torch.zeros(6, 6, dtype=torch.bool)
    if mask != "none":
        valid = some_valid(mask, 6, torch.Generator().manual_seed(5))
    for sign_u in (-1.0, 1.0):
        for sign_v in (-1.0, 1.0):
            positive = torch.full((2, 6), sign_u * magnitude, requires_grad=True)
            negative = torch.full((2, 6, valid.shape[1]), sign_v * magnitude)
            negative[:, ::2] *= 0.5
            negative.requires_grad_()
            value = BOUNDS[name](positive, negative, valid)
            assert value.loss_L.isfinite().all()
            grad_u, grad_v = torch.autograd.grad(value.loss_L.sum(), (positive, negative))
            assert grad_u.isfinite().all()
            assert grad_v.isfinite().all()
            reading_may_be_nan = name == "nwj" and bool((negative > NWJ_READ_TO).any())
            assert reading_may_be_nan or value.nats_L.isfinite().all()


def test_nwj_continues_its_loss_linearly_and_reads_the_exponential_itself():
    valid = torch.ones(1, 1, dtype=torch.bool)
    positive = torch.zeros(1, 1, dtype=torch.float64)

    def at(score: float) -> tuple[float, float, float]:
        negative = torch.full((1, 1, 1), score, dtype=torch.float64, requires_grad=True)
        value = BOUNDS["nwj"](positive, negative, valid)
        return (
            value.loss_L.item(),
            torch.autograd.grad(value.loss_L.sum(), negative)[0].item(),
            value.nats_L.item(),
        )

    edge = math.exp(NWJ_LINEAR_FROM - 1)
    below, above = (at(NWJ_LINEAR_FROM + step) for step in (-1e-9, 1e-9))
    assert below[0] == pytest.approx(edge, rel=1e-8)
    assert above[0] == pytest.approx(edge, rel=1e-8)
    assert below[1] == pytest.approx(edge, rel=1e-8)
    assert above[1] == pytest.approx(edge, rel=1e-8)
    assert at(NWJ_LINEAR_FROM + 7)[0] == pytest.approx(8 * edge)
    for step in (-3.0, 0.0, 7.0):
        assert at(NWJ_LINEAR_FROM + step)[2] == pytest.approx(-math.exp(NWJ_LINEAR_FROM + step - 1))
    assert not math.isnan(at(NWJ_READ_TO)[2])
    assert math.isnan(at(NWJ_READ_TO + 1e-9)[2])


def test_a_learned_temperature_at_its_limit_leaves_nwj_a_gradient_to_train_with():
    """A lane of 64 at temperature 0.01 with one negative as like as the positives: its slope is not 1e38 times theirs,
    and it is the only one that says anything."""
    valid = valid_pairs(torch.arange(64), "all")
    positive = torch.full((1, 64), 100.0, requires_grad=True)
    negative = torch.full((1, 64, 64), -20.0)
    negative[0, 3, 5] = 100.0
    negative.requires_grad_()
    value = BOUNDS["nwj"](positive, negative, valid)
    assert abs(value.loss_L.item()) < 1000
    of_positive, of_negative = torch.autograd.grad(value.loss_L.sum(), (positive, negative))
    assert of_positive.unique().tolist() == [-1 / 64]
    assert of_negative[0, 3, 5].item() == pytest.approx(math.exp(10) / (64 * 63), rel=1e-4)
    assert 1 / 64 < of_negative[0, 3, 5].item() < 10
    # Every score at the limit, as where all features have become alike.
    everywhere = torch.full((1, 64, 64), 100.0, requires_grad=True)
    (of_all,) = torch.autograd.grad(BOUNDS["nwj"](positive, everywhere, valid).loss_L.sum(), everywhere)
    assert of_all.sum().item() == pytest.approx(math.exp(10), rel=1e-4)


def test_nwj_stops_where_the_ratio_is_below_its_linear_part():
    """The best critic of a ratio of e^9 still is 1 + 9: below the limit the optimum is that of the exponential."""
    score = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    valid = torch.ones(1, 1, dtype=torch.bool)
    share = math.exp(-9)  # of the negatives that look like the positives; the others score -inf
    for _ in range(200):
        value = BOUNDS["nwj"](score.reshape(1, 1), score.reshape(1, 1, 1), valid)
        slope = share * (torch.autograd.grad(value.loss_L.sum(), score)[0].item() + 1) - 1
        with torch.no_grad():
            score -= slope / max(share * math.exp(score.item() - 1), 0.2)  # Newton, damped
    assert score.item() == pytest.approx(10.0, abs=1e-6)


def test_only_the_location_that_cannot_be_read_loses_its_reading():
    negative = torch.zeros(3, 2, 2)
    negative[1, 0, 1] = NWJ_READ_TO + 1
    negative[2, 0, 0] = NWJ_READ_TO + 1  # the diagonal is masked, so this one does not count
    nats = BOUNDS["nwj"](torch.zeros(3, 2), negative, valid_pairs(torch.arange(2), "all")).nats_L
    assert nats.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", NAMES)
def test_masked_pairs_have_no_influence(name):
    generator = torch.Generator().manual_seed(7)
    valid = some_valid("holes", 6, generator)
    positive = torch.randn(2, 6, generator=generator, requires_grad=True)
    negative = torch.randn(2, 6, 6, generator=generator)
    values = []
    for filler in (0.0, 1e4, -1e4, 70.0):
        scores = negative.masked_fill(~valid, filler).requires_grad_()
        value = BOUNDS[name](positive, scores, valid)
        grad_u, grad_v = torch.autograd.grad(value.loss_L.sum(), (positive, scores))
        assert (grad_v[:, ~valid] == 0).all()
        assert (grad_v[:, valid] != 0).all()
        values.append((value.loss_L, value.nats_L, grad_u, grad_v))
    for other in values[1:]:
        for mine, reference in zip(other, values[0], strict=True):
            assert torch.equal(mine, reference)


@pytest.mark.parametrize("name", NAMES)
def test_readings_carry_no_gradient(name):
    positive = torch.randn(1, 3, requires_grad=True)
    value = BOUNDS[name](positive, torch.randn(1, 3, 3, requires_grad=True), torch.ones(3, 3, dtype=torch.bool))
    assert value.loss_L.requires_grad
    assert not value.nats_L.requires_grad


def test_the_formulae_of_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    losses, readings = ([line.split(None, 1) for line in block.splitlines()] for block in FORMULAE.findall(text))
    assert sorted(name for name, _ in losses) == NAMES
    generator = torch.Generator().manual_seed(0)
    u, v = (2 * torch.randn(*shape, generator=generator).double() for shape in ((1, 5), (1, 5, 7)))
    functions = {name: getattr(torch, name) for name in ("exp", "mean")} | {"ln": torch.log, "clip": torch.clamp}
    functions |= {"u": u[0], "v": v[0], "N": torch.tensor(7.0), "sum": lambda x: x.sum(1), "softplus": F.softplus}

    def value(formula: str) -> float:
        return eval(formula, functions).item()  # noqa: S307

    for name, formula in losses:
        loss, nats = BOUNDS[name](u, v, torch.ones(5, 7, dtype=torch.bool))
        assert loss.item() == pytest.approx(value(formula))
        assert nats.item() == pytest.approx(value(dict(readings).get(name, f"-({formula})")))
