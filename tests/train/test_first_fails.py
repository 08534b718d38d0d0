"""What the first worker alone does, for all: where it cannot, every worker hears of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import start_ranks
from tiny_run import tiny_config

from mimkd_ray.cli.local_launch import LocalContext
from mimkd_ray.errors import UserError
from mimkd_ray.train import run_record
from mimkd_ray.train.held_out import known_accuracy
from mimkd_ray.train.job import do_job
from mimkd_ray.train.records import checkpoint
from mimkd_ray.train.records.run_dir import MetricsLog

BLOCKED = ("evaluations", "teacher.json", "checkpoints", "result.json", "metrics.jsonl")


class _Full(MetricsLog):
    """On a disk that is full when an evaluation is noted."""

    def write(self, kind: str, step: int, values: object) -> None:
        if kind == "eval":
            raise UserError("cannot write to metrics.jsonl: no space is left")


def _refuse(url: str, *_: object) -> None:
    raise UserError(f"cannot write below {url}: the evaluations and checkpoints are read-only")


def _rank(rank: int, folder: str) -> None:
    """One process; leaves what it heard in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for blocked in BLOCKED:
        seeds = int(blocked == "result.json")
        config = tiny_config(train={"max_steps": 3}, compare={"seeds": seeds, "arms": ("mimkd",)})
        run_dir = Path(folder, f"run-{blocked}")
        if blocked == "metrics.jsonl":
            run_record.MetricsLog = _Full  # type: ignore[misc]
        elif blocked in ("evaluations", "checkpoints"):
            patch = pytest.MonkeyPatch()
            patch.setattr(known_accuracy, "write_json", _refuse)
            patch.setattr(checkpoint, "newest", _refuse)
        elif rank == 0:
            (run_dir / blocked).mkdir(parents=True)  # a folder where the file would be
        dist.barrier()
        try:
            do_job(config, LocalContext(torch.device("cpu"), rank, 2), str(run_dir))
            heard = "nothing"
        except Exception as error:
            heard = f"{type(error).__name__}: {error}"
        if blocked in ("evaluations", "checkpoints"):
            patch.undo()
        Path(folder, f"{blocked}-heard{rank}").write_text(heard)
    dist.destroy_process_group()


def test_every_worker_hears_what_the_first_could_not_write(tmp_path: Path) -> None:
    start_ranks(_rank, (str(tmp_path),), 2)
    for blocked in BLOCKED:
        heard = [(tmp_path / f"{blocked}-heard{rank}").read_text() for rank in range(2)]
        assert heard[0] == heard[1]
        assert heard[0].startswith("UserError: cannot write")
        assert blocked in heard[0]
