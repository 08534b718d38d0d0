"""VGG, MobileNetV2 and the ShuffleNets for 32x32 images, in the form that distillation papers report.

Architectures: arXiv 1409.1556 (with batch norm and one linear layer), 1801.04381 (half width), 1707.01083
(three groups) and 1807.11164.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from mimkd_ray.models.cifar_blocks import StagedNet, conv, conv_bn, conv_bn_relu, init_he


def _vgg(counts: tuple[int, int, int, int, int], num_classes: int) -> nn.Module:
    """Return a VGG; `counts` are the convolutions of the five blocks. The last two blocks share one resolution."""
    blocks: list[nn.Module] = []
    inputs = 3
    for number, (count, width) in enumerate(zip(counts, (64, 128, 256, 512, 512), strict=True)):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if number in (1, 2, 3) else []
        for _ in range(count):
            layers += [conv(inputs, width, 3, bias=True), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        blocks.append(nn.Sequential(*layers))
    net = StagedNet(blocks[0], blocks[1:], inputs, num_classes)
    init_he(net, head_std=0.01)
    return net


class _InvertedResidual(nn.Module):
    """A block that widens by `expand` (1x1), filters each channel (3x3) and narrows linearly (1x1), plus its input if
    that fits."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.body = nn.Sequential(
            *conv_bn_relu(inputs, hidden, 1),
            *conv_bn_relu(hidden, hidden, 3, stride, groups=hidden),
            *conv_bn(hidden, outputs, 1),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride), without activation."""
        narrow = self.body(features)
        return features + narrow if self.adds else narrow


def _mobilenet_v2(num_classes: int) -> nn.Module:
    """MobileNetV2 at half width: taps 16@16, 12@16, 16@8, 48@4, 160@2, 1280 (stages are not activated)."""
    # For each stage: (expansion, width, blocks, stride) of its groups of blocks; the widths are already halved.
    plan = (
        ((1, 8, 1, 1), (6, 12, 2, 1)),
        ((6, 16, 3, 2),),
        ((6, 32, 4, 2), (6, 48, 3, 1)),
        ((6, 80, 3, 2), (6, 160, 1, 1)),
    )
    stages: list[nn.Module] = []
    inputs = 16
    for groups in plan:
        blocks: list[nn.Module] = []
        for expand, width, count, stride in groups:
            for number in range(count):
                blocks.append(_InvertedResidual(inputs, width, stride if number == 0 else 1, expand))
                inputs = width
        stages.append(nn.Sequential(*blocks))
    stem = nn.Sequential(*conv_bn_relu(3, 16, 3, stride=2))
    net = StagedNet(stem, stages, 1280, num_classes, tail=nn.Sequential(*conv_bn_relu(inputs, 1280, 1)))
    init_he(net, head_std=0.01)
    return net


class _Shuffle(nn.Module):
    """A channel shuffle: channel (g, i) of `groups` equal groups moves to place (i, g)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, features: Tensor) -> Tensor:
        """Shuffle the channels: (B, C, H, W) -> (B, C, H, W)."""
        return features.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


class _ShuffleV1(nn.Module):
    """A grouped bottleneck; with stride 2 the pooled input is concatenated, otherwise the input is added."""

    def __init__(self, inputs: int, outputs: int, first: bool, groups: int = 3) -> None:
        super().__init__()
        stride = 2 if first else 1
        added = outputs - inputs if first else outputs
        hidden = added // 4
        # The stem's 24 channels are not grouped because they are few (section 3.2 of the paper).
        early = 1 if inputs == 24 else groups
        self.body = nn.Sequential(
            *conv_bn_relu(inputs, hidden, 1, groups=early),
            _Shuffle(early),
            *conv_bn_relu(hidden, hidden, 3, stride, groups=hidden),
            *conv_bn(hidden, added, 1, groups=groups),
        )
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if first else None
        self.relu = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        body = self.body(features)
        if self.pool is None:
            return self.relu(body + features)
        return self.relu(torch.cat([body, self.pool(features)], dim=1))


def _shufflenet_v1(num_classes: int) -> nn.Module:
    """ShuffleNetV1 with three groups: taps 24@32, 240@16, 480@8, 960@4, 960."""
    stages: list[nn.Module] = []
    inputs = 24
    for width, count in ((240, 4), (480, 8), (960, 4)):
        blocks = [_ShuffleV1(inputs if number == 0 else width, width, number == 0) for number in range(count)]
        stages.append(nn.Sequential(*blocks))
        inputs = width
    return StagedNet(nn.Sequential(*conv_bn_relu(3, 24, 1)), stages, inputs, num_classes)


class _ShuffleV2(nn.Module):
    """A block that passes half of the channels and filters the other half; the first block of a stage filters all of
    them twice."""

    def __init__(self, inputs: int, outputs: int, first: bool) -> None:
        super().__init__()
        stride = 2 if first else 1
        half = outputs // 2
        entering = inputs if first else half
        self.body = nn.Sequential(
            *conv_bn_relu(entering, half, 1),
            *conv_bn(half, half, 3, stride, groups=half),
            *conv_bn_relu(half, half, 1),
        )
        passing = [*conv_bn(inputs, inputs, 3, stride, groups=inputs), *conv_bn_relu(inputs, half, 1)]
        self.side = nn.Sequential(*passing) if first else None
        self.shuffle = _Shuffle(2)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        if self.side is None:
            passed, rest = features.chunk(2, dim=1)
        else:
            passed, rest = self.side(features), features
        return self.shuffle(torch.cat([passed, self.body(rest)], dim=1))


def _shufflenet_v2(num_classes: int) -> nn.Module:
    """ShuffleNetV2: taps 24@32, 116@16, 232@8, 464@4, 1024."""
    stages: list[nn.Module] = []
    inputs = 24
    for width, count in ((116, 4), (232, 8), (464, 4)):
        blocks = [_ShuffleV2(inputs if number == 0 else width, width, number == 0) for number in range(count)]
        stages.append(nn.Sequential(*blocks))
        inputs = width
    tail = nn.Sequential(*conv_bn_relu(inputs, 1024, 1))
    return StagedNet(nn.Sequential(*conv_bn_relu(3, 24, 1)), stages, 1024, num_classes, tail)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "vgg8": partial(_vgg, (1, 1, 1, 1, 1)),
    "vgg11": partial(_vgg, (1, 1, 2, 2, 2)),
    "vgg13": partial(_vgg, (2, 2, 2, 2, 2)),
    "vgg16": partial(_vgg, (2, 2, 3, 3, 3)),
    "mobilenet_v2": _mobilenet_v2,
    "shufflenet_v1": _shufflenet_v1,
    "shufflenet_v2": _shufflenet_v2,
}
