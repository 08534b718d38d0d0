"""Networks as they are placed on a device."""

from __future__ import annotations

import pytest
import torch

from mimkd_ray.config import TrainConfig
from mimkd_ray.train.networks.device_settings import place


@pytest.mark.parametrize(("channels", "first"), [(1, True), (4, True), (16, False)])
def test_a_narrow_shortcut_on_a_cpu_is_channels_first(channels: int, first: bool) -> None:
    """Its gradient would be written beyond its memory: the demo ended in a segmentation fault on a CPU without AVX-512.
    The layout is looked at before the gradient is asked for."""
    seen: list[torch.Tensor] = []
    shortcut = torch.nn.Conv2d(channels, 8, 1, stride=2, bias=False)
    network = place(torch.nn.Sequential(torch.nn.Identity(), shortcut), TrainConfig(), torch.device("cpu"))
    shortcut.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    images_BCHW = torch.randn(25, channels, 8, 8).to(memory_format=torch.channels_last)
    out_BCHW = network(images_BCHW)
    for tensor, strides in ((seen[0], (64 * channels, 64, 8, 1)), (shortcut.weight, (channels, 1, 1, 1))):
        assert (tensor.stride() == strides) is first
    out_BCHW.square().sum().backward()
    kernel_OC, kept_BCHW = shortcut.weight.detach()[:, :, 0, 0].double(), images_BCHW[:, :, ::2, ::2].double()
    expected = 2 * torch.einsum("oc,bchw,bdhw->od", kernel_OC, kept_BCHW, kept_BCHW)
    torch.testing.assert_close(shortcut.weight.grad[:, :, 0, 0].double(), expected, rtol=1e-4, atol=1e-3)
