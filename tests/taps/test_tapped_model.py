"""Taps: shapes without data, unmodified networks, layouts, refusals, compilation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from mimkd_ray.errors import UserError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.taps.tapped_model import TappedModel, TapShape, find_shapes, to_map, to_vector


def _tiny_vit() -> nn.Module:
    return models.VisionTransformer(
        image_size=16, patch_size=4, num_layers=4, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=5
    )


def _randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


class _Odd(nn.Module):
    """A network with every kind of layer that needs care."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.pair = _Pair()
        self.idle = nn.Linear(2, 2)
        self.flat = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.drop = nn.Dropout(0.5, inplace=True)
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.relu(self.bn(self.conv(images)))
        features = self.relu(self.pair(features)[0] - 0.5)
        return self.head(self.drop(self.flat(features)))


class _Pair(nn.Module):
    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features, features


class _Masked(nn.Module):
    """Reading a value has no meta form; it also counts its calls and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        features = self.bn(self.conv(images + torch.rand(())))
        return features.mean((2, 3)) * min(1.0, features.abs().max().item())


def test_shapes_of_resnet18() -> None:
    with torch.device("meta"):
        net = models.resnet18()
    shapes = find_shapes(net, 224)
    # What He et al. (2015), table 1, says for 224 pixels.
    assert shapes["layer1"] == TapShape("layer1", "map", 64, 56, 56)
    assert shapes["layer4"] == TapShape("layer4", "map", 512, 7, 7)
    assert shapes["fc"] == TapShape("fc", "vector", 1000)
    assert shapes["layer4"].locations == 49
    assert shapes["layer4"].values_per_image == 512 * 49
    assert "bn1" not in shapes, "the ReLU overwrites it"
    assert list(find_shapes(net, 64, ["layer3", "layer1"])) == ["layer3", "layer1"]


def test_shapes_are_those_of_a_real_forward() -> None:
    net = models.resnet18(num_classes=7).eval()
    shapes = find_shapes(net, 40)
    seen: dict[str, tuple[int, ...]] = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: seen.__setitem__(name, tuple(out.shape)))
    with torch.no_grad():
        net(torch.zeros(1, 3, 40, 40))
    for name, shape in shapes.items():
        size = (shape.channels,) if shape.kind == "vector" else (shape.channels, shape.height, shape.width)
        assert seen[name] == (1, *size)


def test_shapes_of_tokens_and_channels_last() -> None:
    with torch.device("meta"):
        vit, swin = models.vit_b_16(), models.swin_t()
    tokens = find_shapes(vit, 224, ["encoder"])["encoder"]
    assert tokens == TapShape("encoder", "tokens", 768, 14, 14, prefix=1)
    assert tokens.values_per_image == 197 * 768
    last = find_shapes(swin, 224, ["features.1"])["features.1"]
    assert last == TapShape("features.1", "map", 96, 56, 56, channels_last=True)


@pytest.mark.parametrize("make", [_Odd, _Masked], ids=["meta", "own device"])
def test_the_model_is_left_as_it_was(make: Callable[[], nn.Module]) -> None:
    net = make().train()
    net.bn.eval()  # frozen layers stay frozen
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    assert find_shapes(net, 8, ["conv"])["conv"].channels == 4
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert net.training
    assert not net.bn.training
    assert not net.conv._forward_hooks


def test_unknown_layer_names_the_nearest_and_the_command() -> None:
    net = build_model("resnet34", 10)
    count = sum(1 for name, _ in net.named_modules() if name)
    for call in (lambda: TappedModel(net, ["layr3"]), lambda: find_shapes(net, 64, ["layr3"])):
        with pytest.raises(UserError) as caught:
            call()
        message = str(caught.value)
        assert message.startswith("layer 'layr3' not found in resnet34; did you mean 'layer3', ")
        assert message.endswith(f"? {count} names: run `python -m mimkd_ray layers resnet34`")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "bn",
            "layer 'bn' of _Odd: what follows overwrites its output in place",
        ),
        ("flat", "layer 'flat' of _Odd: what follows overwrites"),  # only in training: an in-place dropout
        ("pair", "layer 'pair' of _Odd returns tuple"),
        ("idle", "layer 'idle' of _Odd exists, but is not called"),
        ("", "layer '' not found"),
    ],
)
def test_refusals(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_shapes(_Odd(), 8, [name])


def test_overwritten_layer_suggests_the_layer_that_returns_the_tensor_afterwards() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 2))
    with pytest.raises(UserError, match="name '1' instead"):
        find_shapes(net, 8, ["0"])
    assert find_shapes(net, 8, ["1"])["1"].height == 6


def test_wrong_image_size_is_a_user_error() -> None:
    with pytest.raises(UserError, match="VisionTransformer failed on a dry run with images of 3x20x20"):
        find_shapes(_tiny_vit(), 20)


def test_a_network_that_fails_without_a_word_is_told_by_the_kind_of_its_error() -> None:
    class Silent(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise NotImplementedError

    with pytest.raises(UserError, match="3x20x20: NotImplementedError; pass the image size"):
        find_shapes(Silent(), 20)


def test_tapped_model_returns_the_layers_own_outputs() -> None:
    net = models.resnet18(num_classes=5).eval()
    images = _randn(2, 3, 32, 32)
    stem = net.maxpool(net.relu(net.bn1(net.conv1(images))))
    layer1 = net.layer1(stem)
    layer2 = net.layer2(layer1)
    tapped = TappedModel(net, ["layer2", "layer1"])
    logits, taps = tapped(images)
    assert list(taps) == ["layer2", "layer1"]
    torch.testing.assert_close(taps["layer1"], layer1)
    torch.testing.assert_close(taps["layer2"], layer2)
    assert tapped.model is net
    assert tapped._store == {}
    tapped.release()
    torch.testing.assert_close(net(images), logits, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in net.modules())


def test_a_layer_called_twice_yields_its_last_call() -> None:
    net = _Odd().eval()
    images = _randn(2, 3, 8, 8)
    first = net.bn(net.conv(images)).relu()
    _, taps = TappedModel(net, ["relu"])(images)
    torch.testing.assert_close(taps["relu"], (first - 0.5).relu())


def test_a_tapped_layer_that_does_not_run_is_a_user_error() -> None:
    with pytest.raises(UserError, match="layer 'idle' of _Odd did not run"):
        TappedModel(_Odd(), ["idle"])(_randn(2, 3, 8, 8))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])  # noqa: S301
def test_copies_have_hooks_of_their_own(clone: Callable[[nn.Module], nn.Module]) -> None:
    tapped = TappedModel(_Odd(), ["conv"]).eval()
    other = clone(tapped)
    with torch.no_grad():
        other.model.conv.weight.zero_()
        other.model.conv.bias.fill_(3.0)
    images = _randn(2, 3, 8, 8)
    with torch.no_grad():
        assert not torch.equal(tapped(images)[1]["conv"], other(images)[1]["conv"])
    assert other._handles[0].id in other.model.conv._forward_hooks
    other.release()
    assert not other.model.conv._forward_hooks
    assert tapped.model.conv._forward_hooks


def test_tokens_become_the_grid_that_the_patches_came_from() -> None:
    """A patch embedding's token at row y, column x must land at [y, x]."""
    shape = TapShape("t", "tokens", 5, 3, 3, prefix=2)
    tap = _randn(2, 11, 5)
    grid, vector = to_map(tap, shape), to_vector(tap, shape)
    assert grid.shape == (2, 5, 3, 3)
    for y in range(3):
        for x in range(3):
            assert torch.equal(grid[:, :, y, x], tap[:, 2 + 3 * y + x])
    assert torch.equal(vector, tap[:, 0])
    bare = TapShape("t", "tokens", 5, 3, 3)
    torch.testing.assert_close(to_vector(tap[:, 2:], bare), sum(tap[:, k] for k in range(2, 11)) / 9)


def test_vit_tokens_equal_its_own_patches() -> None:
    net = _tiny_vit().eval()
    images = _randn(2, 3, 16, 16)
    with torch.no_grad():
        net.encoder.pos_embedding.zero_()
        _, taps = TappedModel(net, ["encoder.dropout", "conv_proj"])(images)
    shape = find_shapes(net, 16, ["encoder.dropout"])["encoder.dropout"]
    assert (shape.prefix, shape.height, shape.width) == (1, 4, 4)
    assert torch.equal(to_map(taps["encoder.dropout"], shape), taps["conv_proj"])


def test_channels_last_and_plain_maps() -> None:
    tap = _randn(2, 3, 3, 5)
    shape = TapShape("m", "map", 5, 3, 3, channels_last=True)
    grid = to_map(tap, shape)
    assert all(torch.equal(grid[:, c], tap[..., c]) for c in range(5))
    torch.testing.assert_close(to_vector(tap, shape), tap.flatten(1, 2).sum(1) / 9)
    plain = TapShape("m", "map", 5, 3, 3)
    assert to_map(grid, plain) is grid
    torch.testing.assert_close(to_vector(grid, plain), to_vector(tap, shape))


def test_a_vector_is_no_map() -> None:
    shape = TapShape("fc", "vector", 7)
    tap = _randn(2, 7)
    assert to_vector(tap, shape) is tap
    with pytest.raises(UserError, match="layer 'fc' returns a vector of 7 values"):
        to_map(tap, shape)


def test_compiles_without_graph_breaks_and_trains_alike() -> None:
    """A ViT; test_input_taps.py has a ResNet."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = TappedModel(_tiny_vit(), ["encoder.layers.encoder_layer_1", "encoder"]).train()
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        images = _randn(2, 3, 16, 16, seed=seed)
        results = []
        for model in (eager, compiled):
            logits, taps = model(images)
            loss = logits.square().mean() + sum(tap.square().mean() for tap in taps.values())
            loss.backward()
            results.append((logits, taps))
        torch.testing.assert_close(results[1][0], results[0][0])
        torch.testing.assert_close(results[1][1], results[0][1])
        assert twin._store == {}
    for one, two in zip(eager.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-3, atol=1e-4)
