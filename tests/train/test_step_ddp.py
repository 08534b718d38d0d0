"""Lanes dealt to two compiled workers: gradients, running statistics and losses equal those of one plain worker.

test_lanes_ddp.py has plain workers.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from jobs_here import TAKES_LONG
from ranks import start_ranks
from tiny_run import tiny_config, tiny_data

from mimkd_ray.cli.local_launch import LocalContext
from mimkd_ray.models.build_model import build_model
from mimkd_ray.train.engine.student import lone_student
from mimkd_ray.train.loop import write_step
from mimkd_ray.train.records.progress import Meter

STEPS = 3


class _Lines:
    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        self.lines.append(values)


def _train(context: LocalContext, compiled: bool) -> dict[str, torch.Tensor]:
    """Three lanes in float64; gradients of the first step, then running statistics and logged losses after three."""
    torch.manual_seed(7)
    teacher = build_model("cifar/resnet8", 10)
    config = tiny_config(train={"lanes": 3, "precision": "float64"})
    student = lone_student(config, tiny_data(config), teacher, context)
    if compiled:
        torch._dynamo.config.optimize_ddp = False
        student.distiller.compile(backend="aot_eager", fullgraph=True)
    log, meter = _Lines(), Meter(context.device, 30)
    student.inputs.start(0)
    found = {}
    for step in range(STEPS):
        record = student.step(step)
        write_step(log, student, step + 1, record.log, meter)  # type: ignore[arg-type]
        if step == 0:
            found["gradients"] = torch.cat([p.grad.flatten() for p in student.distiller.parameters()])
    with student.settled():
        found["statistics"] = student.norms.flat()
    found["losses"] = torch.tensor([line["loss"] for line in log.lines], dtype=torch.float64)
    return found


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(_train(LocalContext(torch.device("cpu"), rank, world), compiled=True), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@TAKES_LONG
def test_two_compiled_workers_train_the_same_model(tmp_path: Path) -> None:
    expected = _train(LocalContext(torch.device("cpu")), compiled=False)
    start_ranks(_rank, (2, str(tmp_path)), 2)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["gradients"], expected["gradients"], rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(found["statistics"], expected["statistics"], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-8, atol=0)
