"""The frame and the building blocks that the CIFAR networks share.

No module here works in place, so the output of every module can be tapped and keeps its values.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class StagedNet(nn.Module):
    """A network of stem -> stage1 .. stageN -> tail -> pool -> head, each a named submodule that can be tapped.

    `tail` is what some networks have between the last stage and the pooling (otherwise the identity); `pool` averages
    over all locations and flattens, so any input size that the stages can halve is accepted. forward: images (B, 3, H,
    W) -> logits (B, num_classes).
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        features: int,
        num_classes: int,
        tail: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stem = stem
        names = tuple(f"stage{number}" for number in range(1, len(stages) + 1))
        for name, stage in zip(names, stages, strict=True):
            self.add_module(name, stage)
        self.tail = tail if tail is not None else nn.Identity()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(features, num_classes)
        self.stage_names = names
        # Read by `default_taps`: published methods use the stages without the stem, and the pooled vector.
        self.default_stages = (*names, "pool")

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, num_classes)."""
        features = self.stem(images)
        for name in self.stage_names:
            features = getattr(self, name)(features)
        return self.head(self.pool(self.tail(features)))


def conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """Return a convolution of odd kernel `size` that keeps H and W (or halves them, rounding up, with stride 2)."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=bias)


def conv_bn(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution without bias and its batch norm, as a list for a Sequential."""
    return [conv(inputs, outputs, size, stride, groups), nn.BatchNorm2d(outputs)]


def conv_bn_relu(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return `conv_bn` and a ReLU."""
    return [*conv_bn(inputs, outputs, size, stride, groups), nn.ReLU()]


class Residual(nn.Module):
    """A block relu(body(x) + shortcut(x)); the shortcut is a 1x1 convolution with batch norm if the shape changes."""

    def __init__(self, body: list[nn.Module], inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_bn(inputs, outputs, 1, stride))
        self.relu = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        return self.relu(self.body(features) + self.shortcut(features))


def init_he(net: nn.Module, head_std: float | None = None) -> None:
    """Initialise every convolution by He's normal initialisation (fan out), as usual for CIFAR networks.

    With `head_std`, linear layers are drawn from N(0, head_std) with zero bias; None leaves PyTorch's default. On the
    meta device nothing is drawn, because that would import PyTorch's compiler: 3 s.
    """
    if any(parameter.is_meta for parameter in net.parameters()):
        return
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and head_std is not None:
            nn.init.normal_(module.weight, 0.0, head_std)
            nn.init.zeros_(module.bias)
