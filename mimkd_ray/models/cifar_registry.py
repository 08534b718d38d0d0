"""The registry of CIFAR networks by name: add a family here.

`build_model("cifar/resnet20", 100)` in zoo.py finds them here. Their taps need no entry: `StagedNet`
(cifar_blocks.py) names them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from mimkd_ray.models import cifar_mobile, cifar_resnet

_RESNETS = (
    *("resnet8_w4", "resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
    *("resnet8x4", "resnet32x4", "wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2", "resnet18", "resnet50"),
)
_OTHERS = ("vgg8", "vgg11", "vgg13", "vgg16", "mobilenet_v2", "shufflenet_v1", "shufflenet_v2")

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    **{name: getattr(cifar_resnet, name) for name in _RESNETS},
    **{name: getattr(cifar_mobile, name) for name in _OTHERS},
}
"""Network name -> function that takes the number of classes and returns the network, randomly initialised."""
