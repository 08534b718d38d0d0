"""One network of every family of timm and torchvision, as the student and as the teacher, in a step of all three terms.

Takes long: a run of as many networks took 50 minutes beside other work.
"""

from __future__ import annotations

import os

import pytest
import torch
import torchvision
from torch import nn

from mimkd_ray import LossConfig, distill

if "MIMKD_TEST_LONG" not in os.environ:  # here, as to import timm takes seconds
    pytest.skip("takes long: MIMKD_TEST_LONG=1", allow_module_level=True)

timm = pytest.importorskip("timm")

SMALL = ("atto", "femto", "pico", "nano", "xxs", "xs", "xt", "tiny", "_t", "mini", "small", "_s", "18", "26", "b0")
MOST_PARAMETERS = 120_000_000
OF_TORCHVISION = [
    *("alexnet", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t"),
    *("mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnext50_32x4d", "shufflenet_v2_x0_5"),
    *("squeezenet1_1", "swin_t", "swin_v2_t", "vit_b_32"),
]
AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")
"""Heads for training alone, of which a student's logits are not."""


def small_of(family: str) -> str:
    """Return a network of a file of timm, by the word for small in its name."""
    names = timm.list_models(module=family)
    return min(names, key=lambda name: next((at for at, word in enumerate(SMALL) if word in name), len(SMALL)))


def build(name: str) -> tuple[nn.Module, int]:
    """Return a network of ten classes, and its image size."""
    if name in OF_TORCHVISION:
        return torchvision.models.get_model(name, weights=None, num_classes=10), 299 if "inception" in name else 224
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
    if parameters > MOST_PARAMETERS:
        pytest.skip(f"{name} has {parameters:,} parameters")
    network = timm.create_model(name, num_classes=10)
    return network, network.default_cfg["input_size"][-1]


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("name", [*OF_TORCHVISION, *map(small_of, timm.list_modules())])
def test_every_parameter_of_a_student_learns_whatever_the_networks(name: str, role: str) -> None:
    network, size = build(name)
    if size > 512:
        pytest.skip(f"{name} is for images of {size} px")
    other = torchvision.models.get_model("mobilenet_v2" if role == "teacher" else "resnet18", num_classes=10)
    teacher, student = (network, other) if role == "teacher" else (other, network)
    distiller = distill(teacher, student, image_size=size, loss=LossConfig(preset="best", local_weight=1.0, queue=64))
    total = distiller(torch.rand(3, 3, size, size), torch.tensor([0, 1, 2])).total
    total.backward()
    assert torch.isfinite(total)
    assert {term.kind for term in distiller.loss.plan} == {"global", "local", "feature"}
    missed = [key for key, parameter in student.named_parameters() if parameter.grad is None]
    assert [key for key in missed if not key.startswith(AUXILIARY)] == []
    distiller.after_step()
