"""Parameters without a gradient, always or in some lanes: two workers train the model of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import start_ranks
from tiny_run import tiny_config, tiny_data
from torch import Tensor, nn

from mimkd_ray.cli.local_launch import LocalContext
from mimkd_ray.config import Config, ModelConfig
from mimkd_ray.models.build_model import build_model
from mimkd_ray.train.engine.student import lone_student

STEPS = 5


class Partial(nn.Module):
    """A student with a layer that it never uses, and two that it uses for every other batch or so, by what it sees."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stage3 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.never = nn.Linear(8, 8)
        self.even, self.odd = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.pool(self.stage3(images))
        kind = self.even if int(images.abs().sum()) % 2 == 0 else self.odd
        return self.head(pooled + kind(pooled))


def _config(lanes: int) -> Config:
    """With decay and momentum, so that a gradient of zeros differs from none."""
    config = tiny_config(
        data={"subset": 200},
        train={"lanes": lanes, "lane_batch": 6, "precision": "float64", "epochs": 4},
        loss={"global_pairs": ("pool:pool",), "local_pairs": ("pool:stage3",), "feature_pairs": ("stage3:stage3",)},
        optim={"lr": 0.1, "weight_decay": 0.05, "schedule": "constant"},
    )
    return replace(config, student=ModelConfig(name=f"{__name__}:Partial"))


def _train(context: LocalContext, config: Config) -> dict[str, Tensor]:
    torch.manual_seed(7)
    student = lone_student(config, tiny_data(config), build_model("cifar/resnet8", 10), context)
    student.inputs.start(0)
    seen = {"start": student.exported().get_parameter("never.weight").detach().clone()}
    for step in range(STEPS):
        student.step(step)
        for name, parameter in student.exported().named_parameters():
            seen[f"{step} has {name}"] = torch.tensor(parameter.grad is not None)
    with student.settled():
        return seen | {name: value.clone() for name, value in student.distiller.state_dict().items()}


def _rank(rank: int, world: int, config: Config, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(_train(LocalContext(torch.device("cpu"), rank, world), config), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("lanes", [2, 4])
def test_two_workers_train_the_model_of_one(tmp_path: Path, lanes: int) -> None:
    config = _config(lanes)
    alone = _train(LocalContext(torch.device("cpu")), config)
    assert torch.equal(alone["student.model.never.weight"], alone["start"]), "no gradient is no decay"
    used = [bool(alone[f"{step} has {kind}.weight"]) for step in range(STEPS) for kind in ("even", "odd")]
    assert len(set(used)) == 2 if lanes == 2 else any(used), "some layers go without a gradient in some steps"
    start_ranks(_rank, (2, config, str(tmp_path)), 2)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: name + text
            )
