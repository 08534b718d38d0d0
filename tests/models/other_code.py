"""CIFAR networks under the module names of RepDistiller and mdistiller, written for the tests from those names."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


def _shuffled(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.shape
    split = x.view(batch, groups, channels // groups, height, width)
    return split.permute(0, 2, 1, 3, 4).reshape(x.shape)


class Basic(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, skip: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = _conv(planes, planes, 3), nn.BatchNorm2d(planes)
        _add_skip(self, skip, inputs, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + _skip(self, x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, skip: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = _conv(planes, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = _conv(planes, 4 * planes, 1), nn.BatchNorm2d(4 * planes)
        _add_skip(self, skip, inputs, 4 * planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(out)) + _skip(self, x))


def _add_skip(block: nn.Module, name: str, inputs: int, outputs: int, stride: int) -> None:
    if stride != 1 or inputs != outputs:
        block.add_module(name, nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)))


def _skip(block: nn.Module, x: Tensor) -> Tensor:
    module = getattr(block, "downsample", None) or getattr(block, "shortcut", None)
    return x if module is None else module(x)


class Layers(nn.Module):
    """conv1, bn1, layer1 ..., and a head of some name."""

    def __init__(
        self, first: int, layers: list[nn.Module], features: int, classes: int, head: str, stem: int = 3
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(3, first, stem), nn.BatchNorm2d(first)
        self.count, self.head_name = len(layers), head
        for number, layer in enumerate(layers, 1):
            self.add_module(f"layer{number}", layer)
        self.last(features)
        self.add_module(head, nn.Linear(features, classes))

    def last(self, features: int) -> None:
        """Add what is between the layers and the pooling."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for number in range(1, self.count + 1):
            x = getattr(self, f"layer{number}")(x)
        if hasattr(self, "conv2"):
            x = F.relu(self.bn2(self.conv2(x)))
        return getattr(self, self.head_name)(x.mean((2, 3)))


def resnet(depth: int, widths: tuple[int, ...], classes: int) -> nn.Module:
    count, inputs, layers = (depth - 2) // 6, widths[0], []
    for number, width in enumerate(widths[1:]):
        blocks = []
        for index in range(count):
            blocks.append(Basic(inputs, width, 2 if number and not index else 1, "downsample"))
            inputs = width
        layers.append(nn.Sequential(*blocks))
    return Layers(widths[0], layers, inputs, classes, "fc")


def wide_stem_resnet(block: type, counts: tuple[int, ...], classes: int) -> nn.Module:
    inputs, layers = 64, []
    for number, count in enumerate(counts):
        blocks = []
        for index in range(count):
            blocks.append(block(inputs, 64 << number, 2 if number and not index else 1, "shortcut"))
            inputs = block.expansion * (64 << number)
        layers.append(nn.Sequential(*blocks))
    return Layers(64, layers, inputs, classes, "linear")


class WideBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), _conv(outputs, outputs, 3)
        if inputs != outputs:
            self.convShortcut = _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (self.convShortcut(active) if hasattr(self, "convShortcut") else x)


class WideNet(nn.Module):
    def __init__(self, depth: int, factor: int, classes: int) -> None:
        super().__init__()
        inputs = 16
        self.conv1 = _conv(3, 16, 3)
        for number in (1, 2, 3):
            blocks = []
            for index in range((depth - 4) // 6):
                outputs = (8 << number) * factor
                blocks.append(WideBlock(inputs, outputs, 2 if number > 1 and not index else 1))
                inputs = outputs
            self.add_module(f"block{number}", nn.ModuleDict({"layer": nn.Sequential(*blocks)}))
        self.bn1, self.fc = nn.BatchNorm2d(inputs), nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for number in (1, 2, 3):
            x = getattr(self, f"block{number}")["layer"](x)
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


class Vgg(nn.Module):
    def __init__(self, counts: tuple[int, ...], classes: int) -> None:
        super().__init__()
        inputs = 3
        for number, (count, width) in enumerate(zip(counts, (64, 128, 256, 512, 512), strict=True)):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            self.add_module(f"block{number}", nn.Sequential(*layers[:-1]))
        self.classifier = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        for number in range(5):
            x = F.relu(getattr(self, f"block{number}")(x))
            x = F.max_pool2d(x, 2) if number < 3 else x
        return self.classifier(x.mean((2, 3)))


class Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.conv = nn.Sequential(
            *(_conv(inputs, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU()),
            *(_conv(hidden, hidden, 3, stride, hidden), nn.BatchNorm2d(hidden), nn.ReLU()),
            *(_conv(hidden, outputs, 1), nn.BatchNorm2d(outputs)),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class Mobile(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        plan = ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1))
        self.conv1 = nn.Sequential(_conv(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks, inputs = nn.ModuleList(), 16
        for expand, width, count, stride in plan:
            blocks = []
            for index in range(count):
                blocks.append(Inverted(inputs, width, stride if not index else 1, expand))
                inputs = width
            self.blocks.append(nn.Sequential(*blocks))
        self.conv2 = nn.Sequential(_conv(inputs, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.conv2(x).mean((2, 3)))


class Shuffle1(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        middle, self.groups, self.stride = outputs // 4, 1 if inputs == 24 else 3, stride
        self.conv1, self.bn1 = _conv(inputs, middle, 1, groups=self.groups), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = _conv(middle, middle, 3, stride, middle), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = _conv(middle, outputs, 1, groups=3), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = _shuffled(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return F.relu(out + x if self.stride == 1 else torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1))


def shuffle_v1(classes: int) -> nn.Module:
    inputs, layers = 24, []
    for width, count in ((240, 4), (480, 8), (960, 4)):
        first = Shuffle1(inputs, width - inputs, 2)
        layers.append(nn.Sequential(first, *(Shuffle1(width, width, 1) for _ in range(count - 1))))
        inputs = width
    return Layers(24, layers, 960, classes, "linear", stem=1)


class Shuffle2(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = _conv(half, half, 1), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = _conv(half, half, 3, 1, half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        passed, rest = x.chunk(2, 1)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(rest)))))
        return _shuffled(torch.cat([passed, F.relu(self.bn3(self.conv3(out)))], 1), 2)


class Down(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1, self.bn1 = _conv(inputs, inputs, 3, 2, inputs), nn.BatchNorm2d(inputs)
        self.conv2, self.bn2 = _conv(inputs, half, 1), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv(inputs, half, 1), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = _conv(half, half, 3, 2, half), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = _conv(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        return _shuffled(torch.cat([left, F.relu(self.bn5(self.conv5(right)))], 1), 2)


class ShuffleV2(Layers):
    def last(self, features: int) -> None:
        self.conv2, self.bn2 = _conv(464, features, 1), nn.BatchNorm2d(features)


def shuffle_v2(classes: int) -> nn.Module:
    inputs, layers = 24, []
    for width, count in ((116, 3), (232, 7), (464, 3)):
        layers.append(nn.Sequential(Down(inputs, width), *(Shuffle2(width) for _ in range(count))))
        inputs = width
    return ShuffleV2(24, layers, 1024, classes, "linear", stem=1)


_THIN, _WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{depth}": lambda n, d=depth: resnet(d, _THIN, n) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": lambda n, d=depth: resnet(d, _WIDE, n) for depth in (8, 32)},
    "resnet18": lambda n: wide_stem_resnet(Basic, (2, 2, 2, 2), n),
    "resnet50": lambda n: wide_stem_resnet(Bottleneck, (3, 4, 6, 3), n),
    **{f"wrn_{d}_{f}": lambda n, d=d, f=f: WideNet(d, f, n) for d in (16, 40) for f in (1, 2)},
    "vgg8": lambda n: Vgg((1, 1, 1, 1, 1), n),
    "vgg11": lambda n: Vgg((1, 1, 2, 2, 2), n),
    "vgg13": lambda n: Vgg((2, 2, 2, 2, 2), n),
    "vgg16": lambda n: Vgg((2, 2, 3, 3, 3), n),
    "mobilenet_v2": Mobile,
    "shufflenet_v1": shuffle_v1,
    "shufflenet_v2": shuffle_v2,
}
"""Our name of a network -> the same function in other code."""
