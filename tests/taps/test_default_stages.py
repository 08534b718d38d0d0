"""Default taps of every family of torchvision's classifiers, and of networks of one's own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from mimkd_ray.errors import UserError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.taps.default_stages import Stages, before_activation, default_taps
from mimkd_ray.taps.dry_run import dry_run
from mimkd_ray.taps.tapped_model import TappedModel, find_shapes

# At 224 pixels. Maps as path:channels@side, L for channels last, +1 for a class token; then the vector.
FAMILIES = {
    "alexnet": "features.1:64@55 features.4:192@27 features.11:256@13 | classifier.5:4096",
    "convnext_tiny": "features.1:96@56 features.3:192@28 features.5:384@14 features:768@7 | classifier.0:768",
    "densenet121": "features.denseblock1:256@56 features.denseblock2:512@28 "
    "features.denseblock3:1024@14 features.denseblock4:1024@7 | features.denseblock4:1024",
    "efficientnet_b0": "features.2:24@56 features.3:40@28 features.5:112@14 features:1280@7 | features:1280",
    "efficientnet_v2_s": "features.2:48@56 features.3:64@28 features.5:160@14 features:1280@7 | features:1280",
    "googlenet": "conv3:192@56 inception3b:480@28 inception4e:832@14 inception5b:1024@7 | avgpool:1024",
    "inception_v3": "Conv2d_4a_3x3:192@52 Mixed_5d:288@25 Mixed_6e:768@12 Mixed_7c:2048@5 | avgpool:2048",
    "maxvit_t": "blocks.0:64@56 blocks.1:128@28 blocks.2:256@14 blocks.3:512@7 | classifier.4:512",
    "mnasnet1_0": "layers.8:24@56 layers.9:40@28 layers.11:96@14 layers:1280@7 | layers:1280",
    "mobilenet_v2": "features.3:24@56 features.6:32@28 features.13:96@14 features:1280@7 | features:1280",
    "mobilenet_v3_large": "features.3:24@56 features.6:40@28 features.12:112@14 features:960@7 | avgpool:960",
    "regnet_y_400mf": "trunk_output.block1:48@56 trunk_output.block2:104@28 trunk_output.block3:208@14 "
    "trunk_output:440@7 | avgpool:440",
    "resnet18": "layer1:64@56 layer2:128@28 layer3:256@14 layer4:512@7 | avgpool:512",
    "resnet50": "layer1:256@56 layer2:512@28 layer3:1024@14 layer4:2048@7 | avgpool:2048",
    "resnext50_32x4d": "layer1:256@56 layer2:512@28 layer3:1024@14 layer4:2048@7 | avgpool:2048",
    "wide_resnet50_2": "layer1:256@56 layer2:512@28 layer3:1024@14 layer4:2048@7 | avgpool:2048",
    "shufflenet_v2_x1_0": "stage2:116@28 stage3:232@14 conv5:1024@7 | conv5:1024",
    "squeezenet1_0": "features.5:256@54 features.10:512@27 features:512@13 | features:512",
    "swin_t": "features.1:96@56L features.3:192@28L features.5:384@14L norm:768@7L | avgpool:768",
    "swin_v2_t": "features.1:96@56L features.3:192@28L features.5:384@14L norm:768@7L | avgpool:768",
    "vgg11": "features.9:256@56 features.14:512@28 features.19:512@14 | classifier.4:4096",
    "vgg16_bn": "features.22:256@56 features.32:512@28 features.42:512@14 | classifier.4:4096",
    "vit_b_16": "encoder.layers.encoder_layer_2:768@14+1 encoder.layers.encoder_layer_5:768@14+1 "
    "encoder.layers.encoder_layer_8:768@14+1 encoder.layers.encoder_layer_11:768@14+1 | encoder:768",
}


def _described(net: nn.Module, image_size: int) -> str:
    run = dry_run(net, image_size)
    stages = default_taps(net, image_size, run)
    shapes = find_shapes(net, image_size, [*stages.maps, stages.vector], run=run)
    words = []
    for name in stages.maps:
        shape = shapes[name]
        last = "L" if shape.channels_last else f"+{shape.prefix}" if shape.prefix else ""
        words.append(f"{name}:{shape.channels}@{shape.height}{last}")
    return f"{' '.join(words)} | {stages.vector}:{shapes[stages.vector].channels}"


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_families(name: str) -> None:
    # RegNet's constructor computes with tensors, which the meta device cannot.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        net = build_model(name, 1000)
    assert _described(net, 224) == FAMILIES[name]


def test_a_small_transformer_has_its_blocks_and_not_what_does_nothing_in_one_of_them() -> None:
    """Each of timm's blocks holds four identities, as many as there are blocks here."""
    transformer = pytest.importorskip("timm.models.vision_transformer")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
    net = transformer.VisionTransformer(num_classes=10, **sizes)
    assert default_taps(net, 32).maps == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")


def test_other_image_sizes() -> None:
    with torch.device("meta"):
        vit, inception = build_model("vit_b_16", 10, image_size=64), build_model("inception_v3", 10)
        resnet = build_model("resnet18", 10)
    assert _described(vit, 64).startswith("encoder.layers.encoder_layer_2:768@4+1 ")
    assert _described(inception, 299) == (
        "Conv2d_4a_3x3:192@71 Mixed_5d:288@35 Mixed_6e:768@17 Mixed_7c:2048@8 | avgpool:2048"
    )
    # At 32 pixels the ImageNet stem is a stage of its own, and layer4 is a single place.
    assert _described(resnet, 32) == ("relu:64@16 layer1:64@8 layer2:128@4 layer3:256@2 | avgpool:512")


def test_a_network_of_ones_own_inside_a_wrapper() -> None:
    def block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    body = nn.Sequential(block(3, 8), block(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    net = nn.Sequential(body, nn.Identity())
    assert default_taps(net, 32) == Stages(("0.0", "0.1"), "0.2")


def test_as_many_classes_as_features() -> None:
    """The features must not be taken for logits because their number is that of the classes."""
    with torch.device("meta"):
        net = build_model("resnet18", 512)
    assert default_taps(net, 224) == Stages(("layer1", "layer2", "layer3", "layer4"), "avgpool")


def test_two_averaged_classifiers_are_both_skipped() -> None:
    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, 2, 1)
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.one, self.two = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, images: Tensor) -> Tensor:
            vector = self.pool(self.conv(images)).flatten(1)
            return self.one(vector) + self.two(vector)

    assert default_taps(Twin(), 16) == Stages(("conv",), "pool")


def test_attention_weights_are_no_stage() -> None:
    """Four heads over 7x7 places have weights of 4 x 49 x 49, which look like the map of a finer stage."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.softmax = nn.Softmax(-1)

        def forward(self, features: Tensor) -> Tensor:
            heads = features.flatten(2).unflatten(1, (4, -1))
            weights = self.softmax(heads.transpose(2, 3) @ heads)
            return features + (heads @ weights).reshape(features.shape)

    coarse = nn.Sequential(nn.Conv2d(8, 16, 4, 4), nn.Sequential(Attention()))
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), coarse, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    assert find_shapes(net, 56)["1.1.0.softmax"].height == 49
    assert default_taps(net, 56) == Stages(("0", "1"), "2")


def test_default_taps_are_never_overwritten_in_place() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.1, inplace=True), nn.Linear(4, 2),
    )  # fmt: skip
    # The dropout overwrites the pooled vector in training, so the map's mean stands in for it.
    assert default_taps(net, 16) == Stages(("1",), "1")


def test_no_map_at_all_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no layer of Sequential returns a map larger than 1x1"):
        default_taps(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), 8)


BEFORE = {
    "cifar/resnet8": "stage1.0.relu@input stage2.0.relu@input stage3.0.relu@input pool",
    "cifar/resnet8x4": "stage1.0.relu@input stage2.0.relu@input stage3.0.relu@input pool",
    "cifar/vgg8": "stage1.3@input stage2.3@input stage3.3@input stage4.2@input pool",
    "cifar/shufflenet_v1": "stage1.3.relu@input stage2.7.relu@input stage3.3.relu@input pool",
    "cifar/wrn_16_2": "stage1 stage2 stage3 pool",  # not activated
    "resnet18": "layer1.1.relu@input layer2.1.relu@input layer3.1.relu@input layer4.1.relu@input avgpool",
    "efficientnet_b0": "features.2 features.3 features.5 features.8.2@input features.8.2@input",
    "vgg11": "features.9@input features.14@input features.19@input classifier.4@input",
    "googlenet": "conv3 inception3b inception4e inception5b avgpool",  # activated by a function call
}


@pytest.mark.parametrize("name", BEFORE)
def test_stages_before_their_activation(name: str) -> None:
    """Every tap has the stage's shape, and activated it is the stage."""
    side = 64 if name in ("resnet18", "efficientnet_b0") else 32 if name.startswith("cifar/") else 224
    with torch.device("meta"):
        net = build_model(name, 10)
    run = dry_run(net, side)
    stages = default_taps(net, side, run)
    names = [*stages.maps, stages.vector]
    found = before_activation(net, side, names, run)
    assert found == dict(zip(names, BEFORE[name].split(), strict=True))
    one, two = (find_shapes(net, side, taps, run=run) for taps in (names, found.values()))
    assert all(one[layer] == dataclasses.replace(two[tap], name=layer) for layer, tap in found.items())


@pytest.mark.parametrize("name", ["cifar/resnet8", "cifar/resnet8x4", "cifar/shufflenet_v1", "resnet18"])
def test_the_activation_of_what_is_before_it_is_the_stage(name: str) -> None:
    torch.manual_seed(0)
    net = build_model(name, 10).eval()
    stages = default_taps(net, 64)
    found = before_activation(net, 64, stages.maps)
    with torch.no_grad():
        _, taps = TappedModel(net, [*found, *found.values()])(torch.randn(1, 3, 64, 64))
    for layer, tap in found.items():
        assert (taps[tap] < 0).any()
        assert torch.equal(taps[tap].relu(), taps[layer])


def test_before_activation_of_other_layers() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.Hardswish(), nn.Sequential(nn.Tanh(), nn.Flatten()), nn.Linear(256, 2)
    )
    # The Tanh's output is flattened: before it is a map, behind it a vector.
    expected = {"1": "1@input", "0": "0", "2": "2", "2.0": "2.0@input", "1@input": "1@input"}
    assert before_activation(net, 16, list(expected)) == expected
    with pytest.raises(UserError, match="layer '4' not found in Sequential"):
        before_activation(net, 16, ["4"])


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o((self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x))


class _FourBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList(_Block() for _ in range(4))
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens.mean(1))


def test_four_blocks_come_before_the_four_projections_of_one() -> None:
    assert default_taps(_FourBlocks(), 16).maps == tuple(f"blocks.{number}" for number in range(4))
