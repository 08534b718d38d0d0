"""The registry of CIFAR networks by name, with the taps of the standard CIFAR-100 protocol.

`build_model("cifar/resnet20", 100)` in zoo.py finds them here.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from mimkd_ray.models.cifar_mobile import (
    mobilenet_v2,
    shufflenet_v1,
    shufflenet_v2,
    vgg8,
    vgg11,
    vgg13,
    vgg16,
)
from mimkd_ray.models.cifar_resnet import (
    resnet8,
    resnet8_w4,
    resnet8x4,
    resnet14,
    resnet18,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet50,
    resnet56,
    resnet110,
    wrn_16_1,
    wrn_16_2,
    wrn_40_1,
    wrn_40_2,
)

_THREE = ("stem", "stage1", "stage2", "stage3", "pool")
_FOUR = ("stem", "stage1", "stage2", "stage3", "stage4", "pool")
_RESNETS = (
    resnet8_w4,
    resnet8,
    resnet14,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
    resnet8x4,
    resnet32x4,
)
_THREE_STAGES = (*_RESNETS, wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2, shufflenet_v1, shufflenet_v2)
_FOUR_STAGES = (resnet18, resnet50, vgg8, vgg11, vgg13, vgg16, mobilenet_v2)

NETWORKS: dict[str, Callable[[int], nn.Module]] = {net.__name__: net for net in (*_THREE_STAGES, *_FOUR_STAGES)}
"""Network name -> function that takes the number of classes and returns the network, randomly initialised."""

TAPS: dict[str, tuple[str, ...]] = {
    **{net.__name__: _THREE for net in _THREE_STAGES},
    **{net.__name__: _FOUR for net in _FOUR_STAGES},
}
"""Network name -> module paths of its taps, shallow to deep; the last one is the pooled vector."""

__all__ = ["NETWORKS", "TAPS", *NETWORKS]
