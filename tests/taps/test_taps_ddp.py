"""Taps under DDP: two processes, several micro-batches each, one synchronisation."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from ranks import start_ranks
from torch import Tensor, nn

from mimkd_ray.models.cifar_registry import NETWORKS
from mimkd_ray.taps.tapped_model import TappedModel

WORLD = 2
MICRO_BATCHES = 3
SIZE = 4


class _Loss(nn.Module):
    """A loss with a head on a tap, as the distillation loss has its critics."""

    def __init__(self) -> None:
        super().__init__()
        # Batch norm in eval mode: the statistics of a micro-batch would not be those of the single process.
        net = NETWORKS["resnet8_w4"](5).eval()
        net.stage1[0].relu.inplace = True  # its input is tapped as a copy
        self.tapped = TappedModel(net, ["stage2", "pool", "stage1.0.relu@input", "stage3.0.relu@input"])
        self.critic = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits, taps = self.tapped(images)
        local = self.critic(taps["stage2"].permute(0, 2, 3, 1)).square().mean()
        given = taps["stage1.0.relu@input"].exp().mean() + taps["stage3.0.relu@input"].exp().mean()
        return logits.square().mean() + local + taps["pool"].abs().mean() + given


def _make() -> tuple[_Loss, Tensor]:
    torch.manual_seed(0)
    return _Loss().double(), torch.randn(WORLD, MICRO_BATCHES, SIZE, 3, 8, 8, dtype=torch.float64)


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    loss, images = _make()
    model = nn.parallel.DistributedDataParallel(loss, broadcast_buffers=False)
    with model.no_sync():
        for part in images[rank][:-1]:
            (model(part) / MICRO_BATCHES).backward()
    (model(images[rank][-1]) / MICRO_BATCHES).backward()
    torch.save({name: value.grad for name, value in loss.named_parameters()}, f"{folder}/grad{rank}.pt")
    dist.destroy_process_group()


def test_gradients_equal_one_process(tmp_path: Path) -> None:
    start_ranks(_work, (str(tmp_path),), WORLD)
    loss, images = _make()
    loss(images.flatten(0, 2)).backward()
    for rank in range(WORLD):
        grads = torch.load(tmp_path / f"grad{rank}.pt")
        for name, parameter in loss.named_parameters():
            assert grads[name].abs().max() > 0, name
            torch.testing.assert_close(grads[name], parameter.grad, rtol=0, atol=1e-9)
