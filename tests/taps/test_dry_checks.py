"""Logits in what networks return, and networks that the meta device cannot build: found before anything starts."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny_run import tiny_config
from torch import Tensor, nn

import mimkd_ray
from mimkd_ray.cli.preflight import preflight
from mimkd_ray.errors import UserError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.search.tap_candidates import find_candidates
from mimkd_ray.taps.dry_checks import build_without_weights, check_logits
from mimkd_ray.taps.tapped_model import TappedModel, find_shapes

Named = namedtuple("Named", ["features", "logits"])
Parts = namedtuple("Parts", ["output", "aux"])


@dataclass
class Output:
    """As Hugging Face's: attributes, some of them None."""

    logits: Tensor
    loss: Tensor | None = None


class _Net(nn.Module):
    """Small maps, 6 features and logits, returned as `form` says."""

    def __init__(self, num_classes: int, form: Callable[[Tensor, Tensor, bool], Any]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(6, num_classes)
        self.form = form

    def forward(self, images: Tensor) -> Any:
        features = self.pool(self.body(images))
        return self.form(features, self.head(features), self.training)


FORMS: dict[str, Callable[[Tensor, Tensor, bool], Any]] = {
    "tensor": lambda f, y, t: y,
    "tuple": lambda f, y, t: (y, {"feats": [f]}),
    "one": lambda f, y, t: (y,),
    "features_first": lambda f, y, t: (f, y),
    "list_with_auxiliary": lambda f, y, t: [y, y - 1, y - 2],
    "dict": lambda f, y, t: {"features": f, "logits": y},
    "dict_out": lambda f, y, t: {"out": y, "aux": y - 1},
    "dict_of_one": lambda f, y, t: {"classes": y},
    "named": lambda f, y, t: Named(f, y),
    "named_output": lambda f, y, t: Parts(y, y - 1),
    "object": lambda f, y, t: Output(y),
    "in_training": lambda f, y, t: Parts(y, y - 1) if t else y,
}


def make_tuple(num_classes: int) -> nn.Module:
    return _Net(num_classes, FORMS["features_first"])


def make_output(num_classes: int) -> nn.Module:
    return _Net(num_classes, FORMS["object"])


def make_thousand(num_classes: int) -> nn.Module:
    return _Net(1000, FORMS["tensor"])


def make_in_training(num_classes: int) -> nn.Module:
    return _Net(num_classes, lambda f, y, t: {"loss": y.sum()} if t else y)


def make_maps(num_classes: int) -> nn.Module:
    return _Net(num_classes, lambda f, y, t: [f[:, :, None, None]])


def make_aux_googlenet(num_classes: int) -> nn.Module:
    from torchvision import models

    return models.googlenet(num_classes=num_classes, aux_logits=True, init_weights=False)


def make_drop_path(num_classes: int) -> nn.Module:
    """Drop-path rates as DINOv2's and Swin's files compute them."""
    rates = [rate.item() for rate in torch.linspace(0, 0.1, 4)] + torch.linspace(0, 0.1, 2).tolist()
    net = _Net(num_classes, FORMS["tensor"])
    net.rates = rates
    return net


class _Reads(_Net):
    """Reads a value in its forward pass, which has no meta form."""

    def forward(self, images: Tensor) -> Any:
        return super().forward(images * min(1.0, images.abs().max().item() + 1.0))


def make_reading(num_classes: int) -> nn.Module:
    return _Reads(num_classes, FORMS["tensor"])


def make_frozen(num_classes: int) -> nn.Module:
    return _Net(num_classes, FORMS["tensor"]).requires_grad_(False)


def _here(function: str) -> str:
    return f"test_dry_checks:{function}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [False, True])
def test_logits_are_found(form: str, training: bool) -> None:
    torch.manual_seed(0)
    net = _Net(10, FORMS[form]).train(training)
    vars(net)["zoo_classes"] = 10
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = net.head(net.pool(net.body(images)))
        logits, taps = TappedModel(net, ["body"])(images)
    assert torch.equal(logits, expected)
    assert taps["body"].shape == (2, 6, 4, 4)
    check_logits(net, 8, 10, trained=True)
    assert net.training is training


def test_what_has_no_logits_is_refused_by_name() -> None:
    cases: dict[str, Callable[[Tensor, Tensor, bool], Any]] = {
        r"_Net returns a list of 0: 2x6x1x1: none of them is a tensor \(B, classes\)": lambda f, y, t: [
            f[:, :, None, None]
        ],
        r"_Net returns a tuple of 0: 2x6, 1: 2x10: 2 of them could be logits": FORMS["features_first"],
        r"_Net returns a dict of loss: a number, note: str: none of them": lambda f, y, t: {
            "loss": y.sum(),
            "note": "x",
        },
        r"_Net returns a NoneType of nothing: none of them": lambda f, y, t: None,
    }
    for message, form in cases.items():
        net = _Net(10, form)
        for call in (
            lambda net=net: check_logits(net, 8),
            lambda net=net: TappedModel(net, [])(torch.zeros(2, 3, 8, 8)),
        ):
            with pytest.raises(UserError, match=message):
                call()
        assert set(find_shapes(net, 8)) >= {"body", "head"}, "which need no logits"
    with pytest.raises(UserError, match=r"returns a tensor of shape \(2, 6, 1, 1\) .* end it with a classifier"):
        check_logits(_Net(10, lambda f, y, t: f[:, :, None, None]), 8)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "make_thousand",
            "gives 1000 logits, and the data has 10 classes: its function was called with num_classes=10",
        ),
        ("make_in_training", "returns a dict of loss: a number: none of them"),
        ("make_maps", "returns a list of 0: 2x6x1x1"),
        ("make_frozen", "has no parameter that requires a gradient"),
    ],
)
def test_before_any_worker_starts(function: str, message: str) -> None:
    """Also where no teacher is used, and so no tap is planned."""
    for loss in ({}, {"name": ()}):
        with pytest.raises(UserError, match=rf"{_here(function)} {message}"):
            preflight(tiny_config(student={"name": _here(function)}, loss=loss))


def test_a_teacher_of_other_classes_is_refused_before_any_worker_starts() -> None:
    with pytest.raises(UserError, match=rf"{_here('make_thousand')} gives 1000 logits, and the data has 10 classes"):
        preflight(tiny_config(teacher={"name": _here("make_thousand")}))


@pytest.mark.parametrize("function", ["make_tuple", "make_output", "make_drop_path", "make_reading"])
def test_runs_with_such_networks_begin(function: str) -> None:
    config = tiny_config(student={"name": _here(function)}, loss={"feature_pairs": ("stage3:body",)})
    preflight(config)
    assert "body" in find_candidates(tiny_config(student={"name": _here(function)}), 10).local[0]


def test_auxiliary_classifiers_in_training_mode() -> None:
    net = build_model(_here("make_aux_googlenet"), 7).train()
    with torch.no_grad():
        logits, _ = TappedModel(net, [])(torch.zeros(2, 3, 224, 224))
    assert logits.shape == (2, 7)


def test_networks_are_built_on_the_meta_device_where_that_can_be() -> None:
    before = torch.get_rng_state()
    devices = {
        name: next(build_without_weights(name, 10, 96).parameters()).device.type
        for name in ("cifar/resnet8", _here("make_tuple"), _here("make_drop_path"), _here("make_reading"))
    }
    assert list(devices.values()) == ["meta", "meta", "cpu", "cpu"]
    assert next(build_without_weights("cifar/resnet8", 10, 32).parameters()).device.type == "cpu"  # small, and sooner
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(UserError, match="unknown model 'resnet19'"):
        build_without_weights("resnet19", 10, 32)


def test_distill_checks_the_networks_that_it_is_given() -> None:
    student, teacher = _Net(10, FORMS["object"]), build_model("cifar/resnet8", 10)
    distiller = mimkd_ray.distill(teacher, student, image_size=16)
    assert distiller(torch.randn(4, 3, 16, 16), torch.arange(4)).logits.shape == (4, 10)
    with pytest.raises(UserError, match="returns a tuple of 0: 2x6, 1: 2x10"):
        mimkd_ray.distill(teacher, _Net(10, FORMS["features_first"]), image_size=16)


def test_the_accuracy_of_such_a_network() -> None:
    net = _Net(10, FORMS["dict"])
    found = mimkd_ray.evaluate(net, [(torch.randn(4, 3, 8, 8), torch.arange(4))])
    assert found.rows == 4
