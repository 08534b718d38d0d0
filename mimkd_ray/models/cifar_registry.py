"""The registry of CIFAR networks by name: add a family here.

`build_model("cifar/resnet20", 100)` in build_model.py finds them here. Their taps need no entry: `StagedNet`
(cifar_blocks.py) names them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from mimkd_ray.models import cifar_resnet, cifar_vgg_mobile

NETWORKS: dict[str, Callable[[int], nn.Module]] = {**cifar_resnet.NETWORKS, **cifar_vgg_mobile.NETWORKS}
"""Network name -> function that takes the number of classes and returns the network, randomly initialised."""
