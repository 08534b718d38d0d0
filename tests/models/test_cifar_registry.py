"""The CIFAR networks: the field's published sizes and tap shapes."""

from __future__ import annotations

import pytest
import torch

from mimkd_ray.models.cifar_registry import NETWORKS
from mimkd_ray.taps.default_stages import default_taps
from mimkd_ray.taps.tapped_model import find_shapes

# Parameters with 100 classes, as published with the CRD benchmark and the papers that use it.
PUBLISHED = {
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "resnet20": 278_324,
    "resnet56": 861_620,
    "wrn_16_2": 703_284,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenet_v2": 812_836,
    "shufflenet_v1": 949_258,
    "shufflenet_v2": 1_355_528,
    "resnet50": 23_705_252,
}
_RESNET = "16@32 16@32 32@16 64@8 64"
_RESNET_X4 = "32@32 64@32 128@16 256@8 256"
_VGG = "64@32 128@16 256@8 512@4 512@4 512"
SHAPES = {
    **dict.fromkeys(("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"), _RESNET),
    **dict.fromkeys(("resnet8x4", "resnet32x4"), _RESNET_X4),
    **dict.fromkeys(("wrn_16_1", "wrn_40_1"), _RESNET),
    **dict.fromkeys(("wrn_16_2", "wrn_40_2"), "16@32 32@32 64@16 128@8 128"),
    **dict.fromkeys(("vgg8", "vgg11", "vgg13", "vgg16"), _VGG),
    "resnet8_w4": "4@32 4@32 8@16 12@8 12",
    "resnet18": "64@32 64@32 128@16 256@8 512@4 512",
    "resnet50": "64@32 256@32 512@16 1024@8 2048@4 2048",
    "shufflenet_v1": "24@32 240@16 480@8 960@4 960",
    "shufflenet_v2": "24@32 116@16 232@8 464@4 1024",
    "mobilenet_v2": "16@16 12@16 16@8 48@4 160@2 1280",
}


def _count(name: str, num_classes: int) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in NETWORKS[name](num_classes).parameters())


def test_every_network_is_in_the_tables() -> None:
    assert set(NETWORKS) == set(SHAPES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    assert _count(name, 100) == PUBLISHED[name]


def test_the_demo_student_has_under_four_thousand_parameters() -> None:
    assert _count("resnet8_w4", 10) == 3_822


@pytest.mark.parametrize("name", SHAPES)
def test_taps_are_those_of_the_protocol(name: str) -> None:
    with torch.device("meta"):
        net = NETWORKS[name](100)
    stages = default_taps(net, 32)
    shapes = find_shapes(net, 32, ("stem", *stages.maps, stages.vector))
    got = [f"{s.channels}" if s.kind == "vector" else f"{s.channels}@{s.height}" for s in shapes.values()]
    assert got == SHAPES[name].split()
    assert all(shape.width == shape.height for shape in shapes.values())


@pytest.mark.parametrize("name", ["resnet8", "resnet8_w4", "wrn_16_2", "resnet18", "vgg8"])
def test_eight_pixels_are_enough(name: str) -> None:
    net = NETWORKS[name](10)
    logits = net(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 10)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "mobilenet_v2", "shufflenet_v1", "shufflenet_v2"])
def test_every_parameter_learns(name: str) -> None:
    """A parameter without gradient would be a layer that the forward pass forgot."""
    torch.manual_seed(0)
    net = NETWORKS[name](5)
    torch.nn.functional.cross_entropy(net(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    idle = [key for key, value in net.named_parameters() if value.grad is None or not value.grad.any()]
    assert idle == []


def test_channel_shuffle_moves_group_g_place_i_to_place_i_group_g() -> None:
    from mimkd_ray.models.cifar_vgg_mobile import _Shuffle

    features = torch.arange(6.0).view(1, 6, 1, 1)
    assert _Shuffle(3)(features).flatten().tolist() == [0, 2, 4, 1, 3, 5]


def test_shufflenet_v2_passes_the_first_half_unchanged() -> None:
    from mimkd_ray.models.cifar_vgg_mobile import _ShuffleV2

    block = _ShuffleV2(8, 8, first=False).eval()
    features = torch.randn(2, 8, 4, 4)
    # Of two groups of four channels, the passing ones land on the even places.
    assert torch.equal(block(features)[:, 0::2], features[:, :4])


def test_residual_taps_are_activated_and_wide_resnets_are_not() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    resnet, wide = NETWORKS["resnet8"](10), NETWORKS["wrn_16_1"](10)
    assert resnet.stage1(resnet.stem(images)).min() == 0
    assert wide.stage1(wide.stem(images)).min() < 0


def test_a_widening_wide_block_activates_before_both_branches() -> None:
    """Batch norm of a fresh network in eval mode is the identity up to its epsilon."""
    torch.manual_seed(0)
    block = NETWORKS["wrn_16_2"](10).stage2[0].eval()
    features = torch.randn(2, 32, 8, 8)
    scale = (1 + 1e-5) ** -0.5
    active = (features * scale).relu()
    inner = (torch.conv2d(active, block.body[0].weight, stride=2, padding=1) * scale).relu()
    expected = torch.conv2d(inner, block.body[3].weight, padding=1)
    expected += torch.conv2d(active, block.shortcut.weight, stride=2)
    torch.testing.assert_close(block(features), expected)


def test_convolutions_have_hes_variance() -> None:
    torch.manual_seed(0)
    weight = NETWORKS["resnet32x4"](100).stage3[1].body[0].weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
