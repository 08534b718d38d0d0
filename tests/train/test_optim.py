from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import nn

from mimkd_ray.config import CriticConfig, OptimConfig
from mimkd_ray.errors import UserError
from mimkd_ray.losses.critics import DotCritic
from mimkd_ray.train.networks.optim import begin_momentum, build_optimizer, learning_rate


def test_step_schedule_is_torchs_multi_step() -> None:
    config = OptimConfig(lr=0.05, milestones=(3, 5), gamma=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3 * 4, 5 * 4], gamma=0.1)
    for step in range(7 * 4):
        assert learning_rate(config, step, 4, 7) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        reference.step()


def test_cosine_schedule_is_torchs_and_has_min_lr_at_the_last_step() -> None:
    """torch's is defined by the steps between its first and its last value."""
    config = OptimConfig(lr=0.2, schedule="cosine", min_lr=0.01)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10 * 5 - 1, eta_min=0.01)
    for step in range(50):
        assert learning_rate(config, step, 5, 10) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("warmup", [0.0, 1.0, 2.5, 0.7])
@pytest.mark.parametrize("steps_per_epoch", [1, 5, 10, 1251])
def test_the_last_step_of_a_cosine_has_min_lr_exactly(warmup: float, steps_per_epoch: int) -> None:
    config = OptimConfig(lr=0.3, schedule="cosine", min_lr=0.007, warmup_epochs=warmup)
    last = 4 * steps_per_epoch - 1
    assert learning_rate(config, last, steps_per_epoch, 4) == 0.007
    assert learning_rate(config, last - 1, steps_per_epoch, 4) > 0.007
    assert learning_rate(config, last + 1, steps_per_epoch, 4) == 0.007, "it rises no more"


def test_a_cosine_of_one_step_keeps_lr() -> None:
    assert learning_rate(OptimConfig(lr=0.3, schedule="cosine"), 0, 1, 1) == 0.3
    assert learning_rate(OptimConfig(lr=0.3, schedule="cosine", warmup_epochs=3), 3, 1, 4) == 0.3


def test_warmup_rises_linearly_to_the_peak_and_the_cosine_starts_there() -> None:
    config = OptimConfig(lr=1.0, schedule="cosine", warmup_epochs=2)
    warm = [learning_rate(config, step, 5, 12) for step in range(10)]
    assert warm == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert learning_rate(config, 10, 5, 12) == pytest.approx(1.0)
    # Step 34.5 is in the middle of steps 10 to 59.
    assert sum(learning_rate(config, step, 5, 12) for step in (34, 35)) / 2 == pytest.approx(0.5)


def test_constant_schedule() -> None:
    assert {learning_rate(OptimConfig(schedule="constant", lr=0.3), step, 2, 4) for step in range(8)} == {0.3}


@pytest.mark.parametrize("decay", ["weights", "all"])
def test_weight_decay_spares_temperatures_and_norms_and_biases_unless_asked(decay: Literal["weights", "all"]) -> None:
    module = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "linear": nn.Linear(4, 2)})
    module["critic"] = DotCritic(4, 4, CriticConfig(width=4))
    optimizer = build_optimizer(OptimConfig(lr=0.1, momentum=0.0, weight_decay=0.5, decay=decay), module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 1.0
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in module.named_parameters():
        decays = parameter.dim() > 1 or (decay == "all" and name != "critic.log_scale")
        factor = 1 - 0.1 * 0.5 if decays else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)


def test_adamw_is_chosen_by_name() -> None:
    assert isinstance(build_optimizer(OptimConfig(name="adamw"), nn.Linear(2, 2)), torch.optim.AdamW)


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"lr": 0.0}, "optim.lr"), ({"weight_decay": -1.0}, "weight_decay"), ({"milestones": (3, 2)}, "milestones")],
)
def test_senseless_values_are_refused(fields: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        OptimConfig(**fields)  # type: ignore[arg-type]


def test_warmup_of_a_fraction_of_an_epoch() -> None:
    config = OptimConfig(lr=1.0, warmup_epochs=0.5, schedule="constant")
    assert learning_rate(config, 0, 10, 4) == pytest.approx(1 / 5)
    assert learning_rate(config, 5, 10, 4) == 1.0
    assert math.isclose(learning_rate(config, 4, 10, 4), 1.0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_parameters_may_join_a_fused_optimiser_later(nesterov: bool) -> None:
    """As a body joins its classifier. On a GPU captured steps have the fused one, which by itself raises TypeError."""
    ends = []
    for fused in (True, False):
        body, head = (nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
        settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": nesterov}
        optimizer = torch.optim.SGD([body, head], fused=fused, **settings)
        if fused:
            optimizer.register_step_pre_hook(begin_momentum)
        for step in range(5):
            head.grad = torch.full((5,), 0.3 + step)
            body.grad = torch.full((5,), 0.7 - step) if step >= 2 else None
            optimizer.step()
        ends.append(torch.stack([body.detach(), head.detach()]))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)
