"""Mutual information of two paired sets of samples: a critic is trained on one part and evaluated on the rest.

    estimate = mutual_information(teacher_features, student_features)
    estimate.nats, estimate.standard_error, estimate.ceiling

The bounds and critics are those of the loss (bounds.py, critics.py). The estimate is a lower bound on the true value
and as good as the critic: more samples give a better one. InfoNCE gives at most ln(batch). The other bounds have no
ceiling and a large variance above a few nats; in batches of 64 they overestimate there (6 nats as 6.2, 10 as 11.2).
SMILE is not a lower bound.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mimkd_ray.config import CriticConfig
from mimkd_ray.config.loss_presets import BoundName
from mimkd_ray.errors import UserError, nearest
from mimkd_ray.losses.bounds import BOUNDS
from mimkd_ray.losses.critics import Critic, build_critic
from mimkd_ray.losses.features import full_precision
from mimkd_ray.losses.terms import Candidates, Objective, score_term

LEAST_HELD_OUT = 8
"""Fewest images of each of the two held-out parts."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Mutual information that a critic measured on held-out pairs, in nats."""

    nats: float
    """Mean over the batches of the last part, which was not used to choose the critic."""
    standard_error: float
    """Standard error of that mean over its batches; NaN for a single batch. It does not include the critic's own
    error."""
    ceiling: float
    """Highest estimate that the bound can give in such batches: ln(batch) for InfoNCE, infinite for the others."""
    curve: tuple[float, ...]
    """Estimates after each epoch on the part that chose the critic."""


def mutual_information(
    x: Tensor,
    y: Tensor,
    bound: BoundName = "infonce",
    *,
    critic: CriticConfig | None = None,
    epochs: int = 50,
    batch: int = 256,
    lr: float = 2e-3,
    held_out: float = 0.25,
    seed: int = 0,
) -> Estimate:
    """Return a lower estimate of the mutual information of ``x`` (N, C) and ``y`` (N, D), whose rows belong together.

    Rows are shuffled and standardised by the mean and deviation of the training part. A critic (by default cosines of
    two small networks, with a learned temperature) is trained with Adam on all but ``held_out`` of the rows. The epoch
    with the best estimate on half of the held-out rows is evaluated on the other half, in batches of ``batch`` over all
    pairs. Runs on the device of ``x``, in float32; the same ``seed`` gives the same result. Time is O(epochs * N *
    batch * width): 20 s for 8,000 pairs on one core.

    Raises UserError for shapes that do not fit, numbers that are not finite, and too few rows.
    """
    x_NC, y_NC = _checked(x, y, bound, batch, held_out, epochs)
    config = critic or CriticConfig(learn_temperature=bound != "nwj")  # nwj's gradient is e^score
    # The critic is trained, and in float32, whatever mode the features were computed in.
    with torch.inference_mode(False), torch.autocast(x.device.type, enabled=False):
        return _trained(x_NC, y_NC, bound, config, epochs, batch, lr, held_out, seed)


def _trained(
    x_NC: Tensor,
    y_NC: Tensor,
    bound: BoundName,
    config: CriticConfig,
    epochs: int,
    batch: int,
    lr: float,
    held_out: float,
    seed: int,
) -> Estimate:
    """Train a critic and return what it reads."""
    device = x_NC.device
    parts = _split(len(x_NC), held_out, seed)
    x_NC, y_NC = (_standardised(value, parts[0]) for value in (x_NC, y_NC))
    train, choice, last = ((x_NC[rows], y_NC[rows]) for rows in parts)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        made = build_critic(config, x_NC.shape[1], y_NC.shape[1]).to(device)
    optimizer = torch.optim.Adam(made.parameters(), lr=lr)
    steps = len(train[0]) // batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    curve: list[float] = []
    best = copy.deepcopy(made.state_dict())
    for _ in range(epochs):
        order = torch.randperm(len(train[0]), generator=generator).to(device)
        for rows in order[: steps * batch].split(batch):
            loss, _ = _score(made, bound, train[0][rows], train[1][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            made.constrain_()
        curve.append(_read(made, bound, *choice, batch)[0])
        if curve[-1] >= max(curve):
            best = copy.deepcopy(made.state_dict())
    made.load_state_dict(best)
    nats, error, ceiling = _read(made, bound, *last, batch)
    return Estimate(nats=nats, standard_error=error, ceiling=ceiling, curve=tuple(curve))


def _checked(x: Tensor, y: Tensor, bound: str, batch: int, held_out: float, epochs: int) -> tuple[Tensor, Tensor]:
    """Return both sets as (N, C), in float32 or float64."""
    if bound not in BOUNDS:
        raise UserError(f"there is no bound {bound!r}{nearest(bound, BOUNDS)}; there are {', '.join(BOUNDS)}")
    if not 1 <= x.dim() <= 2 or not 1 <= y.dim() <= 2 or len(x) != len(y):
        raise UserError(
            f"x has the shape {tuple(x.shape)} and y {tuple(y.shape)}: give (N, C) and (N, D), row by row of one sample"
        )
    if not 0 < held_out < 1 or epochs < 1 or batch < 2:
        raise UserError(
            f"held_out is {held_out}, epochs {epochs} and batch {batch}: give a share between 0 and 1, an epoch or "
            "more, and a batch of 2 or more"
        )
    held = int(len(x) * held_out)
    if held // 2 < LEAST_HELD_OUT or len(x) - held < batch:
        raise UserError(
            f"{len(x)} pairs with held_out {held_out} leave {len(x) - held} to train on in batches of {batch} and "
            f"{held} to read, of which {2 * LEAST_HELD_OUT} are needed: give more pairs, or a smaller batch"
        )
    for name, value in (("x", x), ("y", y)):
        if not torch.isfinite(value).all():
            raise UserError(f"{name} has numbers that are not finite: leave those rows out of both")
    return tuple(full_precision(value.detach()).reshape(len(value), -1) for value in (x, y.to(x.device)))  # type: ignore[return-value]


def _split(count: int, held_out: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows to train on, to choose the critic by, and to evaluate."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = int(count * held_out)
    return order[held:], order[: held // 2], order[held // 2 : held]


def _standardised(value_NC: Tensor, rows: Tensor) -> Tensor:
    """Return every channel with mean 0 and deviation 1 over ``rows``, in float32; a constant channel becomes 0."""
    train_NC = value_NC[rows]
    deviation_C = train_NC.std(0)
    return ((value_NC - train_NC.mean(0)) / torch.where(deviation_C > 0, deviation_C, 1.0)).float()


def _score(critic: Critic, bound: BoundName, x_BC: Tensor, y_BC: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    valid_BB = ~torch.eye(len(x_BC), dtype=torch.bool, device=x_BC.device)
    candidates = Candidates(critic.reduce_teacher(x_BC.unsqueeze(0)), valid_BB)
    return score_term(critic, Objective(bound), candidates, y_BC.unsqueeze(0))


@torch.no_grad()
def _read(critic: Critic, bound: BoundName, x_NC: Tensor, y_NC: Tensor, batch: int) -> tuple[float, float, float]:
    """Return the mean estimate, its standard error and the ceiling, over whole batches; one batch if there are fewer
    rows."""
    size = min(batch, len(x_NC))
    stats = [
        _score(critic, bound, x_NC[start : start + size], y_NC[start : start + size])[1]
        for start in range(0, len(x_NC) - size + 1, size)
    ]
    nats = torch.stack([each["nats"] for each in stats]).double()
    error = float(nats.std()) / math.sqrt(len(nats)) if len(nats) > 1 else math.nan
    return float(nats.mean()), error, float(stats[0]["ceiling"])
