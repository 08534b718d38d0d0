"""What `distill` and its distillers refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_distiller import batch, networks, some_distiller
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mimkd_ray.config import LossConfig
from mimkd_ray.errors import UserError
from mimkd_ray.train.distiller import distill


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "labels is None: .*labels='none'"),
        ({"labels": torch.zeros(8)}, r"labels is \(8,\) of torch.float32, for 8 images: .*whole numbers"),
        ({"labels": torch.zeros(8, 1, dtype=torch.long)}, r"labels is \(8, 1\) of torch.int64"),
        ({"labels": [0] * 8}, "labels is a list"),
        ({"ids": torch.arange(4)}, r"ids is \(4,\) of torch.int64, for 8 images"),
        ({"ids": [f"{number}.jpg" for number in range(8)]}, "ids is a list"),
        ({"ids": torch.rand(8)}, "ids is .*float32"),
        ({"images": torch.zeros(1, 3, 8, 8), "labels": torch.zeros(1).long()}, "1 image has no negatives.*drop_last"),
    ],
)
def test_what_is_no_batch_is_an_error(change: dict[str, Any], message: str) -> None:
    images, labels = batch()
    with pytest.raises(UserError, match=message):
        some_distiller()(**({"images": images, "labels": labels} | change))


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_compiled_network_is_named(who: str) -> None:
    pair = dict(zip(("teacher", "student"), networks(), strict=True))
    compiled = nn.Module()  # of the form of torch.compile's, whose import takes seconds
    compiled.add_module("_orig_mod", pair[who])
    with pytest.raises(UserError, match=f"the {who} is compiled already: .* compile what"):
        distill(**(pair | {who: compiled}), image_size=8)


def test_the_loss_is_not_in_half_precision() -> None:
    images, labels = batch()
    with pytest.raises(UserError, match=r"cast to torch.bfloat16, and its loss is .*cast the student before distill"):
        some_distiller().bfloat16()(images.bfloat16(), labels)
    teacher, student = networks()
    assert distill(teacher, student.bfloat16(), 8)(images.bfloat16(), labels).total.dtype == torch.float32


def test_probabilities_where_class_numbers_are_read() -> None:
    images, mixed = batch()[0], torch.full((8, 10), 0.1)
    with pytest.raises(UserError, match=r"probabilities \(8, 10\), and the distiller was made with labels='partial'"):
        some_distiller(labels="partial")(images, mixed)
    with pytest.raises(UserError, match=r"probabilities \(8, 10\), and loss.name has dkd: pass class numbers"):
        some_distiller(LossConfig(name=("dkd",), rival_warmup=0))(images, mixed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": LossConfig(schedule="rise")}, "steps="),
        ({"loss": LossConfig(name=("dkd",))}, "epoch_steps="),
        ({"loss": LossConfig(name=("crd",))}, "memory bank"),
        ({"loss": LossConfig(negatives="cache")}, "negatives is cache"),
        ({"steps": 0}, "steps is 0"),
        ({"labels": "some"}, "labels is 'some': give one of all, partial, none"),
        ({"loss": "best"}, r"loss is 'best': pass .*LossConfig\(preset='best'\)"),
        ({"image_size": (8, 8)}, r"image_size is \(8, 8\): give one number"),
        ({"student": "resnet8"}, "student is 'resnet8': pass a torch.nn.Module"),
        ({"pairs": {"glob": ["pool:pool"]}}, "did you mean 'global'"),
        ({"pairs": {"global": "pool:pool"}}, "give a list"),
        ({"pairs": {"global": ["pol:pool"]}}, "'pol' not found.*did you mean 'pool'"),
        ({"pairs": {"feature": ["stage3:pool"]}}, "needs a map"),
        ({"student": DistributedDataParallel}, "pass the plain network"),
        ({"student": None}, "one object"),
        ({"loss": LossConfig(name=("dkd",), rival_warmup=0), "labels": "partial"}, "dkd, which reads the label"),
        ({"loss": LossConfig(name=()), "labels": "none"}, "nothing but labels to learn from"),
    ],
)
def test_what_cannot_be_is_an_error(
    options: dict[str, Any], message: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    teacher, student = networks()
    if options.get("student", 0) is None:
        student = teacher
    elif options.get("student") == "resnet8":
        student = "resnet8"  # type: ignore[assignment]
    elif "student" in options:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        request.addfinalizer(dist.destroy_process_group)
        student = DistributedDataParallel(student)
    options = {key: value for key, value in options.items() if key != "student"}
    with pytest.raises(UserError, match=message):
        distill(teacher, student, **({"image_size": 8} | options))
