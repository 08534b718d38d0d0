"""Bounds on mutual information against closed forms: truth, estimate, bias and standard deviation.

Every (bound, seed) of a level is a separate critic, and all of them train side by side in one batched matrix product.
The critic is separable (score = f(x) . g(y); f and g: two hidden layers of 256, ReLU, embedding of 32), Adam at 2e-3
with cosine decay, 4,000 steps of 128 fresh pairs; the estimate takes 2,048 other pairs and all their off-diagonals as
negatives. SMILE trains exactly like jsd, so the two use the same critics.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from report import finish, parser, table
from torch import Tensor

from mimkd_ray.config.loss_presets import BoundName
from mimkd_ray.losses.bounds import BOUNDS, ceiling
from mimkd_ray.losses.negatives import valid_pairs

HIDDEN, EMBED = 256, 32
BATCH, FRESH = 128, 2048
LEARNING_RATE = 2e-3

Sampler = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Level:
    """A joint distribution whose mutual information is known."""

    name: str
    truth: float
    sample: Sampler


@dataclass(frozen=True)
class Estimator:
    """A bound to train, with all other pairs of the batch or with one rolled negative, and the bounds to estimate
    with."""

    train: BoundName
    rolled: bool
    readings: tuple[tuple[str, BoundName], ...]


TRAINED = (
    Estimator("dv", False, (("dv", "dv"),)),
    Estimator("nwj", False, (("nwj", "nwj"),)),
    Estimator("jsd", False, (("jsd_all", "jsd"), ("smile", "smile"))),
    Estimator("jsd", True, (("jsd_rolled", "jsd"),)),
    Estimator("infonce", False, (("infonce", "infonce"),)),
)

TARGETS = {"dv": 0.10, "nwj": 0.10, "jsd_all": 0.10, "smile": 0.10, "infonce": 0.10, "jsd_rolled": 0.15}
"""Largest relative error at 2 nats."""


def gaussian(rho: float, dimensions: int, cubic: bool = False) -> Sampler:
    """Return a sampler of standard Gaussian pairs with correlation rho in every dimension: I = -(d/2) ln(1 - rho^2).
    Cubing y is one-to-one and does not change I."""

    def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, noise = torch.randn(2, count, dimensions, generator=generator).unbind()
        y = rho * x + math.sqrt(1 - rho**2) * noise
        return x, y**3 if cubic else y

    return sample


def two_against_one(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample the covariance [[1, 0, .7], [0, 1, .3], [.7, .3, 1]], the first two against the third: I = -ln(1 - .49 -
    .09) / 2."""
    x, noise = torch.randn(count, 2, generator=generator), torch.randn(count, 1, generator=generator)
    return x, x @ torch.tensor([[0.7], [0.3]]) + math.sqrt(0.42) * noise


def all_levels() -> list[Level]:
    """Return the levels of the full table; the first carries the targets."""
    levels = []
    for cubic in (False, True):
        for nats in (2, 4, 6, 8, 10):
            rho = math.sqrt(1 - math.exp(-nats / 10))
            levels.append(Level(f"{'cubic' if cubic else 'plain'}_{nats}", float(nats), gaussian(rho, 20, cubic)))
    levels.append(Level("bivariate", -0.5 * math.log(1 - 0.75**2), gaussian(0.75, 1)))
    levels.append(Level("two_vs_one", -0.5 * math.log(0.42), two_against_one))
    return levels


class Stack:
    """One side of M separable critics: M independent MLPs as batched matrices, (M, N, channels) -> (M, N, EMBED)."""

    def __init__(self, channels: int, generators: Sequence[torch.Generator], copies: int) -> None:
        self.parameters: list[Tensor] = []
        for fan_in, fan_out in ((channels, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, EMBED)):
            limit = 1 / math.sqrt(fan_in)  # as torch.nn.Linear
            for rows in (fan_in, 1):
                seeds = [(torch.rand(rows, fan_out, generator=generator) * 2 - 1) * limit for generator in generators]
                self.parameters.append(torch.stack(seeds).repeat(copies, 1, 1).requires_grad_())

    def __call__(self, value: Tensor) -> Tensor:
        for layer in range(0, len(self.parameters), 2):
            weight, bias = self.parameters[layer : layer + 2]
            value = torch.baddbmm(bias, value if layer == 0 else value.relu(), weight)
        return value


def split(scores_MBB: Tensor, rolled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return positives, negatives and the mask of valid ones, as the bounds take them, with members in the place of
    locations."""
    batch = scores_MBB.shape[1]
    ids = torch.arange(batch)
    positive = scores_MBB.diagonal(dim1=1, dim2=2)
    if not rolled:
        return positive, scores_MBB, valid_pairs(ids, "all")
    return positive, scores_MBB[:, ids, ids.roll(1)].unsqueeze(2), valid_pairs(ids, "rolled")


def run_level(level: Level, seeds: int, steps: int) -> dict[str, list[float]]:
    """Train all critics of a level and evaluate them on fresh pairs; return the estimates of every seed by
    estimator."""
    generators = [torch.Generator().manual_seed(1000 + seed) for seed in range(seeds)]
    copies = len(TRAINED)

    def batch(count: int) -> tuple[Tensor, Tensor]:
        drawn = [level.sample(count, generator) for generator in generators]
        x, y = (torch.stack(side).repeat(copies, 1, 1) for side in zip(*drawn, strict=True))
        return x, y

    x, y = batch(1)
    left, right = Stack(x.shape[2], generators, copies), Stack(y.shape[2], generators, copies)
    parameters = left.parameters + right.parameters
    optimiser = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        x, y = batch(BATCH)
        scores_MBB = left(x) @ right(y).transpose(1, 2)
        # Members share no weight, so the sum gives each its own gradient, and Adam works element by element.
        loss = torch.stack(
            [
                BOUNDS[estimator.train](*split(scores, estimator.rolled)).loss_L.sum()
                for estimator, scores in zip(TRAINED, scores_MBB.split(seeds), strict=True)
            ]
        ).sum()
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()

    readings: dict[str, list[float]] = {name: [] for estimator in TRAINED for name, _ in estimator.readings}
    with torch.no_grad():
        x, y = batch(FRESH)
        left_MNd, right_MNd = left(x), right(y)
        for member in range(copies * seeds):  # one by one: the scores of all members would be hundreds of MB
            parts = split(left_MNd[member, None] @ right_MNd[member, None].transpose(1, 2), rolled=False)
            for name, bound in TRAINED[member // seeds].readings:
                readings[name].append(BOUNDS[bound](*parts).nats_L.item())
    return readings


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="only the level that has targets: plain, 2 nats")
    options.add_argument("--seeds", type=int, default=3, help="critics of each bound and level (default 3)")
    options.add_argument("--steps", type=int, default=4000, help="steps of training (default 4000)")
    args = options.parse_args()
    torch.set_num_threads(args.threads)

    limit = ceiling("infonce", valid_pairs(torch.arange(FRESH), "all")).item()
    print(f"InfoNCE reads {FRESH} candidates: its ceiling is ln {FRESH} = {limit:.3f} nats (training: {BATCH})\n")
    figures: dict[str, float] = {"infonce_ceiling": limit}
    rows: list[list[object]] = []
    started = time.perf_counter()
    levels = all_levels()
    for level in levels[:1] if args.quick else levels:
        for name, values in run_level(level, args.seeds, args.steps).items():
            reading = torch.tensor(values, dtype=torch.float64)
            mean, deviation = reading.mean().item(), reading.std(correction=0).item()
            rows.append([level.name, name, level.truth, mean, mean - level.truth, deviation])
            figures[f"{level.name}/{name}"] = mean
            figures[f"{level.name}/{name}/std"] = deviation
        print(f"{level.name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    print(table(["level", "bound", "truth", "estimate", "bias", "std"], rows))

    targets = {}
    for name, allowed in TARGETS.items():
        figure = f"{levels[0].name}/{name}/relative_error"
        figures[figure] = abs(figures[f"{levels[0].name}/{name}"] / levels[0].truth - 1)
        targets[figure] = ("<=", allowed)
    return finish("mi_bounds", figures, targets, args.json)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
