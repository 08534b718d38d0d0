"""The loss under torch.compile (one graph, no break) and under DDP (two processes, a lane each)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from jobs_here import TAKES_LONG
from ranks import start_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mimkd_ray.config import CriticConfig, LossConfig
from mimkd_ray.losses import terms
from mimkd_ray.losses.features import Features
from mimkd_ray.losses.mimkd_loss import MIMKDLoss
from mimkd_ray.losses.terms import Term

BATCH = 6
TERMS = (
    Term(kind="global", teacher="pool", student="pool", weight=0.3, teacher_channels=8, student_channels=5),
    Term(kind="local", teacher="pool", student="map", weight=0.2, teacher_channels=8, student_channels=5),
    Term(kind="feature", teacher="map", student="map", weight=0.7, teacher_channels=8, student_channels=5),
)


class Distilled(nn.Module):
    """A small student and its loss in one module, as the trainer has them: images and teacher features to a scalar."""

    def __init__(self, config: LossConfig, plan: tuple[Term, ...]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.head = nn.Linear(5, 4)
        self.loss = MIMKDLoss(config, plan)

    def forward(self, images, teacher_vector, teacher_map, labels, ids):
        student_map = self.stem(images).relu()
        vector = student_map.mean((2, 3))
        teacher = Features(images.new_zeros(len(images), 4), {"pool": teacher_vector}, {"map": teacher_map})
        student = Features(self.head(vector), {"pool": vector}, {"map": student_map})
        return self.loss(teacher, student, labels, ids).total


def make_module(width: int, kind: str = "dot", plan: tuple[Term, ...] = TERMS, **fields) -> Distilled:
    torch.manual_seed(0)
    return Distilled(
        LossConfig(**{"preset": "two_sided", "critic": CriticConfig(kind=kind, width=width)} | fields), plan
    ).double()


def make_lane(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    images, vector, teacher_map = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((BATCH, 3, 1, 2), (BATCH, 8), (BATCH, 8, 4, 4))
    )
    labels = torch.randint(4, (BATCH,), generator=generator)
    ids = torch.arange(BATCH) // (2 if seed == 2 else 1)
    return images, vector, teacher_map, labels, ids


def gradients_of(module: Distilled, call, lane) -> dict[str, torch.Tensor]:
    """The loss, as "value", and the gradient of every parameter."""
    module.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    value = call(*lane)
    value.backward()
    return {"value": value.detach()} | {name: p.grad.clone() for name, p in module.named_parameters()}


# Without a least size of chunks, a dot critic, which holds 2 * 6 scores a location, is computed at once if 16 wide, and
# in chunks of locations if 8 wide. A concat critic holds its width for every pair. Backward is traced too (aot_eager)
# where chunks are recomputed in it, of one term, and where nothing is.
@pytest.mark.parametrize(
    ("width", "fields", "backend"),
    [
        pytest.param(16, {"bound": "nwj", "kd_weight": 0.5}, "aot_eager", id="at-once", marks=TAKES_LONG),
        pytest.param(8, {"plan": TERMS[1:2]}, "aot_eager", id="chunks"),
        pytest.param(8, {"preset": "paper", "kind": "concat", "locations": 1}, "eager", id="rolled-concat-locations"),
        pytest.param(
            8, {"preset": "best", "queue": 16, "soft_temperature": 0.2, "hard_share": 0.5}, "eager", id="queue"
        ),
    ],
)
def test_compiles_without_a_graph_break(width, fields, backend, monkeypatch):
    monkeypatch.setattr(terms, "SMALL_SCORE_BYTES", 0)
    torch._dynamo.reset()
    module, lane = make_module(width, **fields), make_lane(0)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    expected, got = gradients_of(module, module, lane), gradients_of(module, compiled, lane)
    assert got.pop("value").item() == pytest.approx(expected.pop("value").item(), rel=1e-12)
    for name, gradient in expected.items():
        assert torch.allclose(got[name], gradient, rtol=1e-9, atol=1e-12), name


def ddp_worker(rank: int, folder: str, width: int) -> None:
    torch.set_num_threads(1)
    terms.SMALL_SCORE_BYTES = 0
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        module = make_module(width)
        wrapped = DistributedDataParallel(module)
        torch.save(gradients_of(module, wrapped, make_lane(1 + rank)), Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_ddp_gradients_are_the_mean_over_lanes(tmp_path):
    width = 8
    start_ranks(ddp_worker, (str(tmp_path), width), 2)
    module = make_module(width)
    lanes = [gradients_of(module, module, make_lane(seed)) for seed in (1, 2)]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    values = [gradients.pop("value").item() for gradients in ranks]
    assert values == pytest.approx([gradients.pop("value").item() for gradients in lanes], rel=1e-12)
    for name in lanes[0]:
        expected = (lanes[0][name] + lanes[1][name]) / 2
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        assert torch.allclose(ranks[0][name], expected, rtol=1e-9, atol=1e-9), name
    differ = [name for name in lanes[0] if not torch.allclose(lanes[0][name], lanes[1][name], rtol=1e-3)]
    assert "stem.weight" in differ  # else the mean would prove nothing
