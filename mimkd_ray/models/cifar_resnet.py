"""Residual networks for small images: resnet 6n+2, wide resnets, and ResNet-18/50 with a CIFAR stem.

The architectures are those of He et al. (arXiv 1512.03385) and Zagoruyko & Komodakis (arXiv 1605.07146) in the form
that distillation papers use on CIFAR-100. They accept any input size of 8 pixels or more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from mimkd_ray.models.cifar_blocks import Residual, StagedNet, conv, conv_bn, conv_bn_relu, init_he

Block = Callable[[int, int, int], nn.Module]


def _basic(inputs: int, width: int, stride: int) -> nn.Module:
    body = [*conv_bn_relu(inputs, width, 3, stride), *conv_bn(width, width, 3)]
    return Residual(body, inputs, width, stride)


def _bottleneck(inputs: int, width: int, stride: int) -> nn.Module:
    body = [
        *conv_bn_relu(inputs, width, 1),
        *conv_bn_relu(width, width, 3, stride),
        *conv_bn(width, 4 * width, 1),
    ]
    return Residual(body, inputs, 4 * width, stride)


class _PreActivation(nn.Module):
    """A wide resnet's block: bn-relu-conv twice, added to the input; its output is the plain sum without ReLU.

    If the width changes, the shortcut convolution reads the activated input, as in the original code.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.body = nn.Sequential(*conv_bn_relu(inputs, outputs, 3, stride), conv(outputs, outputs, 3))
        self.shortcut = None if inputs == outputs else conv(inputs, outputs, 1, stride)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        active = self.before(features)
        skip = features if self.shortcut is None else self.shortcut(active)
        return skip + self.body(active)


def _stage(block: Block, count: int, inputs: int, width: int, outputs: int, stride: int) -> nn.Module:
    blocks = [block(inputs, width, stride), *(block(outputs, width, 1) for _ in range(count - 1))]
    return nn.Sequential(*blocks)


def _resnet(depth: int, widths: tuple[int, int, int, int], num_classes: int) -> nn.Module:
    """Return a resnet of 6n+2 layers; `widths` are those of the stem and the three stages."""
    count = (depth - 2) // 6
    stages = [
        _stage(_basic, count, before, width, width, stride)
        for before, width, stride in zip(widths, widths[1:], (1, 2, 2), strict=False)
    ]
    net = StagedNet(nn.Sequential(*conv_bn_relu(3, widths[0], 3)), stages, widths[3], num_classes)
    init_he(net)
    return net


def _wrn(depth: int, factor: int, num_classes: int) -> nn.Module:
    """Return a wide resnet of 6n+4 layers; its stem is a bare convolution, its tail the last batch norm and ReLU."""
    count = (depth - 4) // 6
    widths = (16, 16 * factor, 32 * factor, 64 * factor)
    stages = [
        _stage(_PreActivation, count, before, width, width, stride)
        for before, width, stride in zip(widths, widths[1:], (1, 2, 2), strict=False)
    ]
    tail = nn.Sequential(nn.BatchNorm2d(widths[3]), nn.ReLU())
    net = StagedNet(conv(3, widths[0], 3), stages, widths[3], num_classes, tail)
    init_he(net)
    nn.init.zeros_(net.head.bias)
    return net


def _imagenet_style(block: Block, expansion: int, counts: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return ResNet-18/50 with a 3x3 stem of stride 1 and no max-pooling."""
    stages = []
    inputs = 64
    for number, count in enumerate(counts):
        width = 64 << number
        stages.append(_stage(block, count, inputs, width, expansion * width, 1 if number == 0 else 2))
        inputs = expansion * width
    net = StagedNet(nn.Sequential(*conv_bn_relu(3, 64, 3)), stages, inputs, num_classes)
    init_he(net)
    return net


_WIDTHS = (16, 16, 32, 64)
_X4 = (32, 64, 128, 256)

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet8_w4": partial(_resnet, 8, (4, 4, 8, 12)),  # for 8x8 images: 3,822 parameters with 10 classes
    **{f"resnet{depth}": partial(_resnet, depth, _WIDTHS) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(_resnet, depth, _X4) for depth in (8, 32)},
    **{f"wrn_{depth}_{factor}": partial(_wrn, depth, factor) for depth in (16, 40) for factor in (1, 2)},
    "resnet18": partial(_imagenet_style, _basic, 1, (2, 2, 2, 2)),
    "resnet50": partial(_imagenet_style, _bottleneck, 4, (3, 4, 6, 3)),
}
