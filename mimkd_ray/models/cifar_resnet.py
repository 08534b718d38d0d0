"""Residual networks for small images: resnet 6n+2, wide resnets, and ResNet-18/50 with a CIFAR stem.

The architectures are those of He et al. (arXiv 1512.03385) and Zagoruyko & Komodakis (arXiv 1605.07146) in the form
that distillation papers use on CIFAR-100. They accept any input size of 8 pixels or more.
"""

from __future__ import annotations

from collections.abc import Callable

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


def resnet8_w4(num_classes: int = 10) -> nn.Module:
    """A resnet8 of widths 4, 4, 8, 12 for 8x8 images: 3,822 parameters with 10 classes."""
    return _resnet(8, (4, 4, 8, 12), num_classes)


def resnet8(num_classes: int = 100) -> nn.Module:
    """resnet8: taps 16@32, 16@32, 32@16, 64@8, 64."""
    return _resnet(8, (16, 16, 32, 64), num_classes)


def resnet14(num_classes: int = 100) -> nn.Module:
    """resnet14: taps 16@32, 16@32, 32@16, 64@8, 64."""
    return _resnet(14, (16, 16, 32, 64), num_classes)


def resnet20(num_classes: int = 100) -> nn.Module:
    """resnet20: taps 16@32, 16@32, 32@16, 64@8, 64."""
    return _resnet(20, (16, 16, 32, 64), num_classes)


def resnet32(num_classes: int = 100) -> nn.Module:
    """resnet32: taps 16@32, 16@32, 32@16, 64@8, 64."""
    return _resnet(32, (16, 16, 32, 64), num_classes)


def resnet44(num_classes: int = 100) -> nn.Module:
    """resnet44: taps 16@32, 16@32, 32@16, 64@8, 64."""
    return _resnet(44, (16, 16, 32, 64), num_classes)


def resnet56(num_classes: int = 100) -> nn.Module:
    """resnet56: taps 16@32, 16@32, 32@16, 64@8, 64."""
    return _resnet(56, (16, 16, 32, 64), num_classes)


def resnet110(num_classes: int = 100) -> nn.Module:
    """resnet110: taps 16@32, 16@32, 32@16, 64@8, 64."""
    return _resnet(110, (16, 16, 32, 64), num_classes)


def resnet8x4(num_classes: int = 100) -> nn.Module:
    """resnet8x4: taps 32@32, 64@32, 128@16, 256@8, 256."""
    return _resnet(8, (32, 64, 128, 256), num_classes)


def resnet32x4(num_classes: int = 100) -> nn.Module:
    """resnet32x4: taps 32@32, 64@32, 128@16, 256@8, 256."""
    return _resnet(32, (32, 64, 128, 256), num_classes)


def wrn_16_1(num_classes: int = 100) -> nn.Module:
    """WRN-16-1: taps 16@32, 16@32, 32@16, 64@8, 64; stem and stages are not activated."""
    return _wrn(16, 1, num_classes)


def wrn_16_2(num_classes: int = 100) -> nn.Module:
    """WRN-16-2: taps 16@32, 32@32, 64@16, 128@8, 128; stem and stages are not activated."""
    return _wrn(16, 2, num_classes)


def wrn_40_1(num_classes: int = 100) -> nn.Module:
    """WRN-40-1: taps 16@32, 16@32, 32@16, 64@8, 64; stem and stages are not activated."""
    return _wrn(40, 1, num_classes)


def wrn_40_2(num_classes: int = 100) -> nn.Module:
    """WRN-40-2: taps 16@32, 32@32, 64@16, 128@8, 128; stem and stages are not activated."""
    return _wrn(40, 2, num_classes)


def resnet18(num_classes: int = 100) -> nn.Module:
    """ResNet-18 with a CIFAR stem: taps 64@32, 64@32, 128@16, 256@8, 512@4, 512."""
    return _imagenet_style(_basic, 1, (2, 2, 2, 2), num_classes)


def resnet50(num_classes: int = 100) -> nn.Module:
    """ResNet-50 with a CIFAR stem: taps 64@32, 256@32, 512@16, 1024@8, 2048@4, 2048."""
    return _imagenet_style(_bottleneck, 4, (3, 4, 6, 3), num_classes)
