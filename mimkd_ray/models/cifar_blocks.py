"""The frame and the building blocks that the CIFAR networks share.

No module here works in place: the output of every module may be tapped and stays what the module returned.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class StagedNet(nn.Module):
    """stem -> stage1 .. stageN -> tail -> pool -> head, each a named submodule that can be tapped.

    `tail` is what some networks put between the last stage and the pooling (identity where there is nothing);
    `pool` averages over all locations and flattens, so any input size that the stages can halve will do.
    forward: images (B, 3, H, W) -> logits (B, num_classes).
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
        # Read by `default_taps`: the field's methods use the stages without the stem, and the pooled vector.
        self.default_stages = (*names, "pool")

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, num_classes)."""
        features = self.stem(images)
        for name in self.stage_names:
            features = getattr(self, name)(features)
        return self.head(self.pool(self.tail(features)))


def conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution of odd kernel `size` that keeps H and W (or halves them, rounding up, with stride 2)."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=bias)


def conv_bn(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution without bias and its batch norm, as a list to be put into a Sequential."""
    return [conv(inputs, outputs, size, stride, groups), nn.BatchNorm2d(outputs)]


def conv_bn_relu(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """`conv_bn` and a ReLU."""
    return [*conv_bn(inputs, outputs, size, stride, groups), nn.ReLU()]


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)), the shortcut a 1x1 convolution with batch norm where the shape changes."""

    def __init__(self, body: list[nn.Module], inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_bn(inputs, outputs, 1, stride))
        self.relu = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        return self.relu(self.body(features) + self.shortcut(features))


def init_he(net: nn.Module, head_std: float | None = None) -> None:
    """He's normal initialisation (fan out) of every convolution, as the field's CIFAR networks use it.

    `head_std` also draws linear layers from N(0, head_std) with zero bias; None leaves PyTorch's default. On the meta
    device there is nothing to draw, and trying to would import PyTorch's compiler: 3 s.
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
