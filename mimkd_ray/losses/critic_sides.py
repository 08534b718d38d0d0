"""The two sides of a critic: networks that embed teacher or student features before they are compared.

The freedom of the teacher side determines how much the student has to learn. A learned teacher side can select a few
directions in which images differ, reach the bound's ceiling with them, and give the student nothing to learn. A frozen
side keeps the teacher's own geometry, which the student has to match. Every choice is a restricted family of critics,
so the value stays a lower bound on the mutual information of the two features; a smaller family gives a lower value
(docs/method.md).

Sides take (..., channels). They use no batch statistics of the current lane, so the score of a pair does not depend on
the other pairs of its batch. Only the mean of a frozen side and the statistics of a Standardised change, and they are
taken over all lanes of earlier steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROJECTION_SEED = 2110_15946
"""Seed of the fixed projections, which depend only on their sizes."""


class Pointwise(nn.Linear):
    """nn.Linear for features by location, (L, B, in) -> (L, B, out).

    On a CPU it runs as a 1x1 convolution: oneDNN uses the vector units of every processor, whereas PyTorch's BLAS (MKL)
    uses all of them only on Intel's and is half as fast on others.
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

    The shortcut starts as an isometry: the identity if the input is not wider than the output, otherwise a random
    orthogonal projection, which keeps angles on average instead of dropping the channels past ``width``.
    """

    def __init__(self, channels: int, width: int, hidden: int = 0) -> None:
        """Build the layers; ``hidden`` is the number of units of the hidden layer, 0: ``width``."""
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


def unit(feature: Tensor) -> Tensor:
    """Return features at unit length, as F.normalize does, with half of its passes over them."""
    return feature * feature.square().sum(-1, keepdim=True).clamp_min(1e-24).rsqrt()


class Centred(NamedTuple):
    """Teacher vectors (M, d) and the mean by which they are centred where they are compared, without a copy."""

    raw_Md: Tensor
    mean_d: Tensor

    def cosines(self, unit_LBd: Tensor) -> Tensor:
        """Return products of vectors of unit length with the centred ones at unit length: (L, B, M).

        A vector that is its mean up to rounding has no direction; its products are less than 1.
        """
        with torch.no_grad():
            # A product with one vector keeps float32's precision also where TF32 multiplies matrices.
            lengths_M = torch.linalg.vector_norm(self.raw_Md, dim=1).square() + self.mean_d @ self.mean_d
            rounding_M = 32 * torch.finfo(lengths_M.dtype).eps * lengths_M + 1e-24
            inverse_M = (lengths_M - 2 * (self.raw_Md @ self.mean_d)).maximum(rounding_M).rsqrt()
        shift_LB1 = (unit_LBd @ self.mean_d).unsqueeze(-1)
        return (unit_LBd @ self.raw_Md.T - shift_LB1) * inverse_M


def cosines(unit_LBd: Tensor, teacher_LKd: Tensor, queue: Centred | None = None) -> Tensor:
    """Return products of vectors of unit length with those of the teacher, and behind them with a queue's: (L, B, K) or
    (L, B, K + M)."""
    own_LBK = unit_LBd @ teacher_LKd.transpose(1, 2)
    return own_LBK if queue is None else torch.cat([own_LBK, queue.cosines(unit_LBd)], dim=2)


class FrozenSide(nn.Module):
    """The teacher's own features, centred by their mean over training; it has no learned parameters.

    ``reduce`` projects features that are wider than ``width`` on ``width`` fixed orthogonal directions, which keeps
    angles on average and limits the cost of comparing them; narrower ones are not changed. ``forward`` centres reduced
    features. The mean is over the images of all earlier steps and all workers (:meth:`update`): a buffer, saved in
    checkpoints. In the first step, and without any step, the mean of the lane is used.
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
        """Project features: (..., channels) -> (..., width)."""
        return feature if self.projection_dC is None else F.linear(feature, self.projection_dC.to(feature.dtype))

    def forward(self, reduced_LKd: Tensor, lane: int) -> Tensor:
        """Centre reduced features. The first ``lane`` features of each location belong to the lane itself."""
        own_d = reduced_LKd[:, :lane].mean((0, 1))
        return reduced_LKd - torch.where(self.images > 0, self.mean_d.to(own_d.dtype), own_d)

    def centred(self, reduced_Md: Tensor) -> Centred:
        """Return reduced features of earlier steps, ready to be compared with vectors of the lane."""
        return Centred(reduced_Md, self.mean_d.to(reduced_Md.dtype))

    @torch.no_grad()
    def update(self, mean_d: Tensor, images: int) -> None:
        """Update the running mean with the mean of ``images`` more images' reduced features."""
        self.images += images
        self.mean_d += (mean_d - self.mean_d) * (images / self.images.double())


SLOWEST_RATE = 0.01
"""Smallest share of a step in the statistics of a :class:`Standardised`. The student's features change, so the first
thousand steps must not count for ever."""

EPS = 1e-5
"""Constant added to a channel's variance, so that a constant channel stays near 0."""


class Standardised(nn.Module):
    """Standardisation of features: each channel minus its mean, divided by its standard deviation, (..., channels) ->
    the same.

    Both are running statistics over the images and locations of all lanes of earlier steps and all workers: buffers,
    saved in checkpoints. They get no gradient. In the first step, and without any step, the statistics of the lane are
    used. A training step calls :meth:`observe` with each lane (it only adds to buffers, so that it can be compiled) and
    then :meth:`update` with the mean over all lanes of :meth:`observed`.
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
        """Standardise features. The first ``lane`` features of each location belong to the lane itself; by default
        all."""
        own_LBC = feature_LKC if lane is None else feature_LKC[:, :lane]
        mean_C, variance_C = torch.where(self.steps > 0, self.moments_2C, _moments(own_LBC)).to(feature_LKC.dtype)
        return (feature_LKC - mean_C) * (variance_C + EPS).rsqrt()

    @torch.no_grad()
    def observe(self, own_LBC: Tensor) -> None:
        """Add a lane's mean and variance to this step's sums."""
        self.sums_2C += _moments(own_LBC)
        self.lanes += 1

    @torch.no_grad()
    def observed(self) -> Tensor:
        """Return the mean over this worker's lanes of the step, (2 * channels,), and reset the sums."""
        mean_2C = self.sums_2C / self.lanes
        self.sums_2C.zero_()
        self.lanes.zero_()
        return mean_2C.flatten()

    @torch.no_grad()
    def update(self, moments: Tensor) -> None:
        """Update the running mean and variance with those of a step over all lanes, (2 * channels,)."""
        self.steps += 1
        rate = (1 / self.steps.double()).clamp(min=SLOWEST_RATE)
        self.moments_2C += (moments.view_as(self.moments_2C) - self.moments_2C) * rate


@torch.no_grad()
def _moments(value: Tensor) -> Tensor:
    """Return the mean and unbiased variance of each channel over images and locations: (2, channels)."""
    several = min(1, value.shape[:-1].numel() - 1)
    variance_C, mean_C = torch.var_mean(value, tuple(range(value.dim() - 1)), correction=several)
    return torch.stack([mean_C, variance_C])
