"""The two sides of a critic: networks that embed teacher or student features before they are compared.

What a side may do decides what the bound asks of the student. A learned side of the teacher can pick out a few
directions by which images differ, reach the bound's ceiling with them, and leave the student as it is. A frozen side
keeps the teacher's own geometry: the student must come to it. All are restricted families of critics, so the value
stays a lower bound on the mutual information of the two features, a lower one the less the family can do
(docs/method.md).

Sides take (..., channels). They have no batch statistics of their own lane in them, so a pair scores the same wherever
its partner came from; only a frozen side's mean and the statistics of a Standardised, taken over all lanes of earlier
steps, move.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROJECTION_SEED = 2110_15946
"""Seed of the fixed projections: they depend on nothing but their sizes."""


class Pointwise(nn.Linear):
    """nn.Linear for features by location, (L, B, in) -> (L, B, out).

    On a CPU it runs as a 1x1 convolution: oneDNN uses all of a processor's vector units, PyTorch's BLAS (MKL) only
    those of Intel's, and is half as fast on others.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or input.dtype != torch.float32 or input.dim() != 3 or 1 in input.shape[:2]:
            return super().forward(input)
        swapped = input.stride(0) < input.stride(1)  # a view of a channels-last map: memory holds images first
        rows_NMC = input.transpose(0, 1) if swapped else input
        weight_OC11 = self.weight[:, :, None, None]
        output_NO1M = F.conv2d(rows_NMC.transpose(1, 2).unsqueeze(2), weight_OC11, self.bias)
        output_NMO = output_NO1M.squeeze(2).transpose(1, 2)
        return output_NMO.transpose(0, 1) if swapped else output_NMO


class Projection(nn.Module):
    """Linear-ReLU-Linear plus a linear shortcut, then LayerNorm: (..., channels) -> (..., width).

    The shortcut starts as an isometry: the identity where the input is not wider than the output, and otherwise a
    random orthogonal projection, which keeps angles on average instead of dropping the channels past ``width``.
    """

    def __init__(self, channels: int, width: int, hidden: int = 0) -> None:
        """``hidden``: units of the hidden layer; 0: ``width``."""
        super().__init__()
        self.hidden = Pointwise(channels, hidden or width)
        self.output = Pointwise(hidden or width, width)
        self.shortcut = Pointwise(channels, width, bias=False)
        self.norm = nn.LayerNorm(width)
        if channels <= width:
            nn.init.eye_(self.shortcut.weight)
        else:
            nn.init.orthogonal_(self.shortcut.weight)

    def forward(self, feature: Tensor) -> Tensor:
        return self.norm(self.output(F.relu(self.hidden(feature))) + self.shortcut(feature))


class Centred(NamedTuple):
    """Many teacher vectors, centred and of unit length, without a copy of them: the vectors as they are, their mean,
    and one over the length of each after centring."""

    raw_Md: Tensor
    mean_d: Tensor
    inverse_M: Tensor

    def cosines(self, unit_LBd: Tensor) -> Tensor:
        """Products with vectors of unit length: (L, B, M)."""
        shift_LB1 = (unit_LBd @ self.mean_d).unsqueeze(-1)
        return (unit_LBd @ self.raw_Md.T - shift_LB1) * self.inverse_M


class FrozenSide(nn.Module):
    """The teacher's own features: centred by their mean over training, nothing learned.

    ``reduce`` projects features that are wider than ``width`` on ``width`` fixed orthogonal directions, which keeps
    angles on average and bounds what comparing them costs; narrower ones stay as they are. ``forward`` centres
    reduced features. The mean is that of every image of all earlier steps, all workers' (:meth:`update`): a buffer,
    in checkpoints. In the first step, and before any, it is the lane's own.
    """

    mean_d: Tensor
    images: Tensor
    projection_dC: Tensor | None

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.width = min(channels, width)
        self.register_buffer("mean_d", torch.zeros(self.width))
        self.register_buffer("images", torch.zeros((), dtype=torch.int64))
        projection_dC = None
        if channels > width:
            generator = torch.Generator().manual_seed(PROJECTION_SEED)
            projection_dC = nn.init.orthogonal_(torch.empty(width, channels, device="cpu"), generator=generator)
        self.register_buffer("projection_dC", projection_dC, persistent=False)

    def reduce(self, feature: Tensor) -> Tensor:
        """(..., channels) -> (..., width)."""
        return feature if self.projection_dC is None else F.linear(feature, self.projection_dC.to(feature.dtype))

    def forward(self, reduced_LKd: Tensor, lane: int) -> Tensor:
        """Centre reduced features. The first ``lane`` of each location are the lane's own."""
        own_d = reduced_LKd[:, :lane].mean((0, 1))
        return reduced_LKd - torch.where(self.images > 0, self.mean_d.to(own_d.dtype), own_d)

    @torch.no_grad()
    def centred(self, reduced_Md: Tensor) -> Centred:
        """Reduced features of earlier steps, to be compared with vectors of the lane."""
        mean_d = self.mean_d.to(reduced_Md.dtype)
        square_M = torch.linalg.vector_norm(reduced_Md, dim=1).square() - 2 * (reduced_Md @ mean_d) + mean_d @ mean_d
        return Centred(reduced_Md, mean_d, square_M.clamp(min=1e-20).rsqrt())

    @torch.no_grad()
    def update(self, mean_d: Tensor, images: int) -> None:
        """Take the mean of ``images`` more images' reduced features into the running mean."""
        self.images += images
        self.mean_d += (mean_d - self.mean_d) * (images / self.images.double())


SLOWEST_RATE = 0.01
"""A step's share in the statistics of a :class:`Standardised` falls to this: the student's features move, and its first
thousand steps should not count for ever."""

EPS = 1e-5
"""Added to a channel's variance: one that never changes stays near 0."""


class Standardised(nn.Module):
    """Features less their mean, over their standard deviation, channel by channel: (..., channels) -> the same.

    Both are running statistics over the images and locations of all lanes of earlier steps, all workers': buffers, in
    checkpoints. No gradient goes through them. In the first step, and before any, they are the lane's own. A training
    step calls :meth:`observe` with each lane, which only adds to buffers, so that it may be compiled, and
    :meth:`update` with the mean over all lanes of what :meth:`observed` returns.
    """

    moments_2C: Tensor
    steps: Tensor
    sums_2C: Tensor
    lanes: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("moments_2C", torch.stack([torch.zeros(channels), torch.ones(channels)]))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sums_2C", torch.zeros(2, channels), persistent=False)
        self.register_buffer("lanes", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, feature_LKC: Tensor, lane: int | None = None) -> Tensor:
        """Standardise. The first ``lane`` of each location are the lane's own; by default all."""
        own_LBC = feature_LKC if lane is None else feature_LKC[:, :lane]
        mean_C, variance_C = torch.where(self.steps > 0, self.moments_2C, _moments(own_LBC)).to(feature_LKC.dtype)
        return (feature_LKC - mean_C) * (variance_C + EPS).rsqrt()

    @torch.no_grad()
    def observe(self, own_LBC: Tensor) -> None:
        """Add a lane's mean and variance to this step's."""
        self.sums_2C += _moments(own_LBC)
        self.lanes += 1

    @torch.no_grad()
    def observed(self) -> Tensor:
        """Return the mean over this worker's lanes of the step, (2 * channels,), and forget them."""
        mean_2C = self.sums_2C / self.lanes
        self.sums_2C.zero_()
        self.lanes.zero_()
        return mean_2C.flatten()

    @torch.no_grad()
    def update(self, moments: Tensor) -> None:
        """Take a step's mean and variance over all lanes, (2 * channels,), into the running ones."""
        self.steps += 1
        rate = (1 / self.steps.double()).clamp(min=SLOWEST_RATE)
        self.moments_2C += (moments.view_as(self.moments_2C) - self.moments_2C) * rate


@torch.no_grad()
def _moments(value: Tensor) -> Tensor:
    """Mean and unbiased variance of each channel over images and locations: (2, channels)."""
    several = min(1, value.shape[:-1].numel() - 1)
    variance_C, mean_C = torch.var_mean(value, tuple(range(value.dim() - 1)), correction=several)
    return torch.stack([mean_C, variance_C])
