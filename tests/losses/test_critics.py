"""Critics: shortcut, scores by hand, temperature, and the separable form of the concat critic."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mimkd_ray.config import CriticConfig
from mimkd_ray.errors import UserError
from mimkd_ray.losses.critics import ConcatCritic, DotCritic, Pointwise, Projection, build_critic


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def perturb(module: nn.Module) -> nn.Module:
    """In float64, with every parameter away from its start, so that zeros and ones hide nothing."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize(("channels", "width"), [(12, 5), (5, 5), (3, 8)])
def test_shortcut_starts_as_an_isometry(channels, width):
    weight = Projection(channels, width).shortcut.weight.detach()
    gram = weight @ weight.T if channels >= width else weight.T @ weight
    assert torch.allclose(gram, torch.eye(min(channels, width)), atol=1e-5)
    if channels <= width:
        x = torch.randn(7, channels)
        assert torch.equal(F.linear(x, weight)[:, :channels], x)
    else:
        # No input channel is dropped, as the first rows of an identity would drop those past the width.
        assert (weight.abs().sum(0) > 0).all()


def test_projection_equals_the_formula():
    projection = perturb(Projection(6, 4))
    x = torch.randn(3, 6, dtype=torch.float64)
    for row, got in zip(x, projection(x), strict=True):
        hidden = (projection.hidden.weight @ row + projection.hidden.bias).clamp(min=0)
        value = projection.output.weight @ hidden + projection.output.bias + projection.shortcut.weight @ row
        value = (value - value.mean()) / (value.var(correction=0) + projection.norm.eps).sqrt()
        assert torch.allclose(got, value * projection.norm.weight + projection.norm.bias, rtol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", ["images first", "locations first", "vectors", "one image", "rows"])
def test_pointwise_is_a_linear_layer(shape: str, bias: bool) -> None:
    """In float32 on a CPU maps take another way: values and gradients against the matrix product in float64."""
    layer = Pointwise(6, 4, bias=bias)
    memory = {"images first": (3, 5, 6), "vectors": (1, 3, 6), "one image": (5, 1, 6), "rows": (7, 6)}
    leaf = torch.randn(memory.get(shape, (5, 3, 6)), requires_grad=True)
    x = leaf.transpose(0, 1) if shape == "images first" else leaf
    upstream = torch.randn(*x.shape[:-1], 4)
    got = layer(x)
    got.backward(upstream)
    exact = x.detach().double() @ layer.weight.detach().double().T + (layer.bias.detach().double() if bias else 0.0)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)
    to_x = upstream.double() @ layer.weight.detach().double()
    to_weight = upstream.double().flatten(0, -2).T @ x.detach().double().flatten(0, -2)
    assert leaf.grad is not None
    assert layer.weight.grad is not None
    gradient = leaf.grad.transpose(0, 1) if shape == "images first" else leaf.grad
    torch.testing.assert_close(gradient.double(), to_x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad.double(), to_weight, rtol=1e-5, atol=1e-5)
    if bias:
        assert layer.bias.grad is not None
        torch.testing.assert_close(layer.bias.grad, upstream.flatten(0, -2).sum(0), rtol=1e-5, atol=1e-5)


def test_dot_score_is_scaled_cosine_plus_bias():
    critic = perturb(DotCritic(7, 5, CriticConfig(width=4, temperature=0.2)))
    teacher, student = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    scores = critic.all_pairs(critic.embed_student(student), critic.embed_teacher(teacher))
    assert scores.shape == (2, 3, 3)
    for place in range(2):
        for i in range(3):
            for k in range(3):
                s, t = critic.student(student[place, i]), critic.teacher(teacher[place, k])
                cosine = (s @ t) / (s.norm() * t.norm())
                expected = math.exp(critic.log_scale.item()) * cosine + critic.bias
                assert scores[place, i, k].item() == pytest.approx(expected.item(), rel=1e-12)


def test_temperature_starts_where_the_config_says():
    critic = DotCritic(4, 4, CriticConfig(width=4, temperature=0.1))
    assert critic.scale().item() == pytest.approx(10)
    assert isinstance(critic.log_scale, nn.Parameter)


def test_learned_temperature_is_clamped_and_comes_back():
    critic = DotCritic(4, 4, CriticConfig(width=4, temperature=0.1, min_temperature=0.02))
    with torch.no_grad():
        critic.log_scale.fill_(9.0)
    assert critic.scale().item() == pytest.approx(50, rel=1e-5)
    # Beyond the limit the clamp gives no gradient; constrain_ returns the parameter to where there is one.
    assert torch.autograd.grad(critic.scale(), critic.log_scale)[0].item() == 0
    critic.constrain_()
    assert critic.log_scale.item() == pytest.approx(math.log(50))
    assert critic.scale().item() == pytest.approx(50, rel=1e-5)
    assert torch.autograd.grad(critic.scale(), critic.log_scale)[0].item() == pytest.approx(50, rel=1e-5)


def test_constrain_leaves_a_legal_temperature_alone():
    critic = DotCritic(4, 4, CriticConfig(width=4, temperature=0.1))
    before = critic.log_scale.detach().clone()
    critic.constrain_()
    assert torch.equal(critic.log_scale, before)


def test_a_start_at_the_limit_still_learns():
    critic = DotCritic(4, 4, CriticConfig(width=4, temperature=0.01, min_temperature=0.01))
    critic.constrain_()
    assert torch.autograd.grad(critic.scale(), critic.log_scale)[0].item() == pytest.approx(100, rel=1e-5)


def test_fixed_temperature_is_saved_but_not_trained():
    critic = DotCritic(4, 4, CriticConfig(width=4, temperature=0.5, learn_temperature=False))
    assert "log_scale" not in dict(critic.named_parameters())
    assert "log_scale" in critic.state_dict()
    assert critic.scale().item() == pytest.approx(2)


def in_training(critic: ConcatCritic) -> ConcatCritic:
    """With running statistics of earlier steps."""
    for standard in critic.standard:
        standard.steps.fill_(3)
        standard.moments_2C.copy_(0.5 + torch.rand_like(standard.moments_2C))
    return critic


def test_concat_equals_a_network_on_the_joined_features():
    critic = in_training(perturb(ConcatCritic(7, 5, CriticConfig(kind="concat", width=6))))
    teacher, student = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    first_t, first_s = critic.teacher, critic.student
    norm_t, norm_s = (
        lambda x, standard=standard: (x - standard.moments_2C[0]) / (standard.moments_2C[1] + 1e-5).sqrt()
        for standard in critic.standard
    )
    joined_weight = torch.cat([first_s.weight, first_t.weight], dim=1)
    scores = critic.all_pairs(critic.embed_student(student)[None], critic.embed_teacher(teacher)[None])
    assert scores.shape == (1, 3, 3)
    for i in range(3):
        for k in range(3):
            joined = torch.cat([norm_s(student[i]), norm_t(teacher[k])])
            hidden = (joined_weight @ joined + first_t.bias).clamp(min=0)
            hidden = (critic.hidden.weight @ hidden + critic.hidden.bias).clamp(min=0)
            expected = critic.output.weight[0] @ hidden + critic.output.bias[0]
            assert scores[0, i, k].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("kind", ["dot", "concat"])
@pytest.mark.parametrize("teacher_locations", [1, 4])
def test_paired_is_the_diagonal_and_a_single_teacher_serves_all_locations(kind, teacher_locations):
    critic = perturb(build_critic(CriticConfig(kind=kind, width=6), 7, 5))
    teacher = critic.embed_teacher(torch.randn(teacher_locations, 3, 7, dtype=torch.float64))
    student = critic.embed_student(torch.randn(4, 3, 5, dtype=torch.float64))
    square = critic.all_pairs(student, teacher)
    assert square.shape == (4, 3, 3)
    assert torch.allclose(critic.paired(student, teacher), square.diagonal(dim1=1, dim2=2), rtol=1e-12)
    assert torch.allclose(square, critic.all_pairs(student, teacher.expand(4, 3, 6)), rtol=1e-12)
    # Rows are students and columns teachers.
    rolled = critic.paired(student, teacher.roll(1, dims=1))
    assert torch.allclose(rolled[:, 2], square[:, 2, 1], rtol=1e-12)


@pytest.mark.parametrize("kind", ["dot", "concat"])
def test_a_pair_scores_the_same_whoever_else_is_in_the_batch(kind):
    critic = build_critic(CriticConfig(kind=kind, width=6), 7, 5).double().train()
    if kind == "concat":
        in_training(critic)
    teacher, student = torch.randn(1, 8, 7, dtype=torch.float64), torch.randn(1, 8, 5, dtype=torch.float64)
    together = critic.paired(critic.embed_student(student), critic.embed_teacher(teacher))
    alone = critic.paired(critic.embed_student(student[:, 2:3]), critic.embed_teacher(teacher[:, 2:3]))
    assert torch.allclose(together[:, 2:3], alone, rtol=1e-12)


@pytest.mark.parametrize("kind", ["dot", "concat"])
def test_build_critic(kind):
    critic = build_critic(CriticConfig(kind=kind, width=6), 7, 5)
    assert isinstance(critic, DotCritic if kind == "dot" else ConcatCritic)
    assert critic.pair_width == (1 if kind == "dot" else 6)
    critic.constrain_()
    assert critic.scale().item() == pytest.approx(10 if kind == "dot" else 1)
    assert critic.bias.shape == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"temperature": 0.005}, "min_temperature <= temperature"),
        ({"min_temperature": 0.0}, "min_temperature 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_bad_configs_name_the_field(fields, message):
    with pytest.raises(UserError, match=message):
        CriticConfig(**fields)
