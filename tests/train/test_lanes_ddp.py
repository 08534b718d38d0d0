"""Four lanes on 1, 2, 3 and 4 workers, and stopped and started again: one model, the same samples.

Each worker is a process of its own with gloo, started anew for each attempt, as after a kill.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs_here import TAKES_LONG
from ranks import start_ranks
from tiny_run import tiny_config, tiny_data

from mimkd_ray.cli.local_launch import LocalContext
from mimkd_ray.config import Config, CriticConfig
from mimkd_ray.models.build_model import build_model
from mimkd_ray.train.distributed import gather_lanes, is_distributed
from mimkd_ray.train.engine.restart import resume, save
from mimkd_ray.train.engine.student import lone_student
from mimkd_ray.train.records import checkpoint

LANES = 4


def _config(precision: str, labels: str = "all", side: int = 0, **loss: Any) -> Config:
    return tiny_config(
        data={"subset": 200, "pipeline": "digits", "labels": labels},
        teacher={"image_size": side},
        train={"lanes": LANES, "lane_batch": 6, "precision": precision, "epochs": 20, "ema_decay": 0.9},
        optim={"lr": 0.02, "schedule": "constant"},
        loss=loss,
    )


def _attempt(context: LocalContext, config: Config, run_dir: str, stop: int) -> dict[str, Any]:
    """Go on from the newest checkpoint to step ``stop`` and leave one there. What this attempt saw, by rank."""
    torch.manual_seed(7)
    teacher = build_model("cifar/resnet8", 10)
    student = lone_student(config, tiny_data(config), teacher, context)
    start = resume(student, run_dir)
    student.inputs.start(start)
    seen: dict[str, Any] = {"samples": [], "losses": []}
    for step in range(start, stop):
        record = student.step(step)
        ids_LB = gather_lanes(torch.stack(record.ids), LANES)
        seen["samples"] += [(step, lane, record.view, ids) for lane, ids in enumerate(ids_LB.tolist())]
        share = len(student.my_lanes) / LANES
        loss = record.log["loss"].double() * share
        if is_distributed():
            dist.all_reduce(loss)
        seen["losses"].append(float(loss))
        if step == 0:
            seen["gradient"] = torch.cat([p.grad.flatten() for p in student.distiller.parameters()])
    writer = checkpoint.Writer(run_dir, 2, lambda _: None) if context.rank == 0 else None
    save(student, stop, writer)
    if writer is not None:
        writer.wait()
    with student.settled():
        seen["weights"] = torch.cat([value.flatten() for value in student.distiller.state_dict().values()])
        seen["statistics"] = student.norms.flat()
        for name, network in {"student": student.distiller.student.model, "exported": student.exported()}.items():
            seen[name] = {key: value.clone() for key, value in network.state_dict().items()}
    seen["own"] = student.norms.flat()
    return seen


def _rank(rank: int, world: int, config: Config, run_dir: str, stop: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    seen = _attempt(LocalContext(torch.device("cpu"), rank, world), config, run_dir, stop)
    torch.save(seen, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def _workers(world: int, config: Config, run_dir: Path, stop: int) -> list[dict[str, Any]]:
    """What each of ``world`` fresh processes saw of an attempt."""
    folder = run_dir / f"attempt-{world}-{stop}"
    folder.mkdir(parents=True)
    start_ranks(_rank, (world, config, str(run_dir), stop, str(folder)), world)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "preset", "labels", "side"),
    [
        (2, "two_sided", "none", 12),
        (3, "best", "partial", 0),
        pytest.param(4, "two_sided", "all", 0, marks=TAKES_LONG),
    ],
)
def test_a_resumed_run_equals_its_twin_bit_for_bit(
    tmp_path: Path, world: int, preset: str, labels: str, side: int
) -> None:
    """Float32, saved mid-epoch, with running statistics of each worker's own and a moving average of the weights; also
    without labels, and from a teacher whose images are larger."""
    config = _config("float32", labels, side, preset=preset, queue=200)
    whole = _workers(world, config, tmp_path / "whole", 11)
    first = _workers(world, config, tmp_path / "cut", 5)
    second = _workers(world, config, tmp_path / "cut", 11)
    for rank in range(world):
        assert torch.equal(whole[rank]["weights"], second[rank]["weights"])
        assert torch.equal(whole[rank]["own"], second[rank]["own"])
        for name, value in whole[0]["exported"].items():
            assert torch.equal(second[rank]["exported"][name], value), name
        assert first[rank]["losses"] + second[rank]["losses"] == whole[rank]["losses"]
        assert first[rank]["samples"] + second[rank]["samples"] == whole[rank]["samples"]
    assert not torch.equal(whole[0]["own"], whole[1]["own"]), "statistics are each worker's own between checkpoints"


@pytest.mark.slow
@pytest.mark.parametrize("steps", [12, pytest.param(52, marks=TAKES_LONG)])
def test_any_number_of_workers_and_a_changing_one_train_one_model(tmp_path: Path, steps: int) -> None:
    """In float64, with negatives from all lanes and 9 of the 64 locations of a map; 2 -> 4 -> 3 workers is a resize by
    checkpoints.

    The exported network, a moving average, is one as well: weights by their own size, buffers as the statistics are.
    """
    config = _config("float64", global_weight=0.1, local_weight=0.1, negatives="step", locations=9)
    alone = _attempt(LocalContext(torch.device("cpu")), config, str(tmp_path / "alone"), steps)
    assert len(set(alone["losses"])) == steps
    trained = {key for key, _ in build_model("cifar/resnet8_w4", 10).named_parameters()}
    for key in trained:
        assert float((alone["exported"][key] - alone["student"][key]).norm()) > 1e-3 * alone["student"][key].norm(), key
    stops = ((2, steps // 3), (4, steps * 2 // 3), (3, steps))
    attempts = [_workers(world, config, tmp_path / "resized", stop) for world, stop in stops]
    assert [line for attempt in attempts for line in attempt[0]["samples"]] == alone["samples"]
    losses = [loss for attempt in attempts for loss in attempt[0]["losses"]]
    for step, (ours, theirs) in enumerate(zip(losses, alone["losses"], strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-8), step
    for seen in attempts[-1]:
        _assert_statistics(seen["statistics"], alone["statistics"], "running statistics")
        for key, value in alone["exported"].items():
            found = seen["exported"][key]
            if key in trained:
                assert float((found - value).norm() / value.norm()) < 1e-8, key
            else:
                assert torch.equal(found, seen["student"][key]), "buffers are the student's"
                _assert_statistics(found, value, key)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        pytest.param({"preset": "best", "local_weight": 0.5}, id="frozen"),
        pytest.param(
            {"negatives": "queue", "critic": CriticConfig(kind="concat", width=8)}, id="concat", marks=TAKES_LONG
        ),
    ],
)
def test_a_queue_and_running_statistics_are_those_of_one_worker(tmp_path: Path, loss: dict[str, Any]) -> None:
    """12 steps in float64 with a queue of some steps; a frozen side and same-class images left out, or the concat
    critic's statistics of both sides; 3 -> 2 workers."""
    config = _config("float64", queue=150, **loss)
    alone = _attempt(LocalContext(torch.device("cpu")), config, str(tmp_path / "alone"), 12)
    attempts = [_workers(world, config, tmp_path / "resized", stop) for world, stop in ((3, 7), (2, 12))]
    losses = [loss for attempt in attempts for loss in attempt[0]["losses"]]
    assert [line for attempt in attempts for line in attempt[0]["samples"]] == alone["samples"]
    assert losses == pytest.approx(alone["losses"], rel=1e-8)
    torch.testing.assert_close(attempts[-1][0]["weights"], alone["weights"], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_rivals_on_two_workers_train_the_model_of_one(tmp_path: Path) -> None:
    """Those that work within a lane, with batch norms in their connectors, in float64."""
    config = _config("float64", name=("mimkd", "fitnet", "review", "rkd", "dkd"))
    alone = _attempt(LocalContext(torch.device("cpu")), config, str(tmp_path / "alone"), 6)
    pair = _workers(2, config, tmp_path / "two", 6)
    assert pair[0]["samples"] == alone["samples"]
    assert pair[0]["losses"] == pytest.approx(alone["losses"], rel=1e-8)
    for key, value in alone["student"].items():
        torch.testing.assert_close(pair[0]["student"][key], value, rtol=1e-6, atol=1e-9)
    for seen in pair:
        _assert_statistics(seen["statistics"], alone["statistics"], "2 workers")


def _assert_statistics(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9, msg=lambda text: f"{name}: {text}")


@pytest.mark.slow
def test_first_gradients_in_float32(tmp_path: Path) -> None:
    config = _config("float32")
    alone = _attempt(LocalContext(torch.device("cpu")), config, str(tmp_path / "alone"), 1)["gradient"]
    assert alone.abs().max() > 1e-2
    found = _workers(3, config, tmp_path / "workers", 1)[0]["gradient"]
    assert float((found - alone).norm() / alone.norm()) < 1e-5
