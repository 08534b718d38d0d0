"""Taps of a layer's input: values and gradients against the network taken apart, shapes, refusals, compilation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from mimkd_ray.errors import UserError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.taps.tapped_model import TappedModel, TapShape, find_shapes


def _randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


class _Scale(nn.Module):
    """Takes its features by keyword."""

    def forward(self, *, features: Tensor) -> Tensor:
        return 2 * features


class _Merge(nn.Module):
    """Takes a tuple."""

    def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
        return both[0] + both[1]


class _Fold(nn.Module):
    """Takes a tensor of rank 5."""

    def forward(self, parts: Tensor) -> Tensor:
        return parts.flatten(1, 2)


class _Clamp(nn.Module):
    """Overwrites its input and does not say so."""

    def forward(self, features: Tensor) -> Tensor:
        return features.clamp_(min=0)


class _Net(nn.Module):
    """Layers whose inputs need care; `relu` runs twice, `block` works in place, `drop` does in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.scale = _Scale()
        self.merge = _Merge()
        self.fold = _Fold()
        self.block = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
        self.clamp = _Clamp()
        self.idle = nn.Linear(2, 2)
        self.codes = nn.Embedding(3, 4)
        self.flat = nn.Flatten()
        self.drop = nn.Sequential(nn.Dropout(0.5, inplace=True))
        self.head = nn.Linear(256, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.relu(self.conv(images))
        features = self.scale(features=features) - 0.5
        features = self.relu(features)
        features = self.merge((features, features - 1))
        features = self.fold(features.unflatten(1, (2, 2)))
        features = self.block(features - 0.1)
        features = self.clamp(features - 0.2) + self.codes(torch.zeros(1, dtype=torch.long)).view(4, 1, 1)
        return self.head(self.drop(self.flat(features)))


def test_shapes_of_inputs() -> None:
    with torch.device("meta"):
        net, vit = models.resnet18(), models.vit_b_16()
    shapes = find_shapes(net, 224, ["layer1.0.conv1@input", "layer2", "layer2.1.relu@input", "fc@input"])
    # What He et al. (2015), table 1, says for 224 pixels; torchvision's ReLU works in place.
    assert shapes == {
        "layer1.0.conv1@input": TapShape("layer1.0.conv1@input", "map", 64, 56, 56),
        "layer2": TapShape("layer2", "map", 128, 28, 28),
        "layer2.1.relu@input": TapShape("layer2.1.relu@input", "map", 128, 28, 28),
        "fc@input": TapShape("fc@input", "vector", 512),
    }
    tokens = find_shapes(vit, 224, ["encoder.ln@input"])["encoder.ln@input"]
    assert tokens == TapShape("encoder.ln@input", "tokens", 768, 14, 14, prefix=1)
    assert not any("@" in name for name in find_shapes(net, 64)), "without names: outputs"


def _taken_apart(net: nn.Module, images: Tensor) -> Tensor:
    """The sum in front of the last ReLU of layer2, of torchvision's resnet18, without any layer that works in place."""
    stem = net.maxpool(F.relu(net.bn1(net.conv1(images))))

    def block(part: nn.Module, given: Tensor) -> Tensor:
        inner = part.bn2(part.conv2(F.relu(part.bn1(part.conv1(given)))))
        return inner + (given if part.downsample is None else part.downsample(given))

    for part in (*net.layer1, net.layer2[0]):
        stem = F.relu(block(part, stem))
    return block(net.layer2[1], stem)


def test_the_input_of_an_activation_that_works_in_place() -> None:
    """Its values, some of them negative, and its gradient; the logits are those of the network alone."""
    net = models.resnet18(num_classes=5).double().eval()
    images, weight = _randn(2, 3, 32, 32).double(), _randn(2, 128, 4, 4, seed=1).double()
    tapped = TappedModel(net, ["layer2.1.relu@input", "layer2.1.relu"])
    logits, taps = tapped(images)
    before, after = taps["layer2.1.relu@input"], taps["layer2.1.relu"]
    expected = _taken_apart(net, images)
    assert (expected < 0).any()
    torch.testing.assert_close(before, expected)
    assert torch.equal(after, before.relu())
    ours = torch.autograd.grad((before * weight).sum() + logits.sum(), net.layer1[0].conv1.weight)
    plain = net(images)  # with the hooks still on: they change nothing
    assert torch.equal(plain, logits)
    theirs = torch.autograd.grad((expected * weight).sum() + plain.sum(), net.layer1[0].conv1.weight)
    torch.testing.assert_close(ours, theirs)
    tapped.release()
    assert torch.equal(net(images), logits)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())


def test_the_input_of_a_cifar_activation_is_the_networks_own_tensor() -> None:
    net = build_model("cifar/resnet8", 10).eval()
    images = _randn(2, 3, 16, 16)
    _, taps = TappedModel(net, ["stage2@input", "stage1.0.relu", "stage3.0.relu@input", "head@input", "pool"])(images)
    assert list(taps) == ["stage2@input", "stage1.0.relu", "stage3.0.relu@input", "head@input", "pool"]
    assert taps["stage2@input"] is taps["stage1.0.relu"]
    assert taps["head@input"] is taps["pool"]
    block, given = net.stage3[0], net.stage2(taps["stage2@input"])
    torch.testing.assert_close(taps["stage3.0.relu@input"], block.body(given) + block.shortcut(given))


def test_a_layer_called_twice_yields_the_input_of_its_last_call() -> None:
    net = _Net().eval()
    images = _randn(2, 3, 8, 8)
    _, taps = TappedModel(net, ["relu@input"])(images)
    torch.testing.assert_close(taps["relu@input"], 2 * net.conv(images).relu() - 0.5)


REFUSALS = {
    "idle@input": "layer 'idle' of _Net exists, but is not called in a forward pass",
    "scale@input": "layer 'scale' of _Net is given no positional argument, .* name its output, 'scale', or a layer",
    "merge@input": "layer 'merge' of _Net is given tuple as its first argument, .* name its output, 'merge'",
    "codes@input": "layer 'codes' of _Net is given a tensor of torch.int64 as its first argument",
    "fold@input": r"layer 'fold' of _Net is given a tensor of shape \(2, 2, 2, 8, 8\) for 2 images of 8x8",
    "block@input": r"what follows overwrites its input in place, so the tap would hold other values than the layer was "
    r"given; name 'block\.0@input' instead, which keeps a copy",
    "clamp@input": "what follows overwrites its input in place, .* name the layer's output, 'clamp', or a layer before",
    "drop@input": r"overwrites its input in place, .* name 'drop\.0@input' instead",  # in training alone
    "flat": r"overwrites its output in place, .*, or 'drop\.0@input', which keeps a copy of these values",
    "merg@input": r"layer 'merg' not found in _Net; did you mean 'merge'",
    "@input": "layer '' not found in _Net",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    with pytest.raises(UserError, match=REFUSALS[name]):
        find_shapes(_Net(), 8, [name])


def test_what_is_refused_would_hold_other_values_and_what_is_named_instead_does_not() -> None:
    net = _Net().eval()
    _, taps = TappedModel(net, ["block@input", "block.0@input", "merge"])(_randn(2, 3, 8, 8))
    given = taps["merge"] - 0.1
    assert torch.equal(taps["block.0@input"], given)
    assert torch.equal(taps["block@input"], given.relu())
    assert not torch.equal(given, given.relu())
    assert find_shapes(net, 8, ["block.0@input", "drop.0@input"])["drop.0@input"].channels == 256


def test_without_an_input_there_is_no_tap() -> None:
    for name in ("scale@input", "idle@input", "merge@input"):
        path = name.removesuffix("@input")
        with pytest.raises(UserError, match=f"layer '{path}' of _Net did not run in this .* pass, or was given no"):
            TappedModel(_Net(), [name])(_randn(2, 3, 8, 8))
    with pytest.raises(UserError, match="layer 'merg' not found in _Net; did you mean 'merge'"):
        TappedModel(_Net(), ["merg@input"])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])  # noqa: S301
def test_copies_have_hooks_of_their_own(clone: Callable[[nn.Module], nn.Module]) -> None:
    tapped = TappedModel(_Net(), ["relu@input"]).eval()
    other = clone(tapped)
    images = _randn(2, 3, 8, 8)
    with torch.no_grad():
        other.model.conv.weight.zero_()
        assert not torch.equal(tapped(images)[1]["relu@input"], other(images)[1]["relu@input"])
    other.release()
    assert not other.model.relu._forward_pre_hooks
    assert tapped.model.relu._forward_pre_hooks


def test_compiles_without_graph_breaks_and_trains_alike() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    names = ["relu@input", "relu", "layer1", "layer2.0.relu@input", "layer3.0.conv1@input", "avgpool"]
    eager = TappedModel(net, names).train()
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        images = _randn(2, 3, 16, 16, seed=seed)
        results = []
        for model in (eager, compiled):
            logits, taps = model(images)
            (logits.square().mean() + sum(tap.exp().mean() for tap in taps.values())).backward()
            results.append((logits, taps))
        torch.testing.assert_close(results[1], results[0])
        assert (results[1][1]["layer2.0.relu@input"] < 0).any()
        assert twin._store == {}
    for one, two in zip(eager.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-3, atol=1e-4)
