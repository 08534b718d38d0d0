"""Two workers with captured steps train bit for bit what two with plain steps and DDP train.

That holds for two: a sum of two halves does not depend on its order. With more workers the place in a bucket decides
how a sum is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import start_ranks
from test_engines import captured
from test_unused_ddp import _config as with_unused
from tiny_run import tiny_config, tiny_data
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mimkd_ray.cli.local_launch import LocalContext
from mimkd_ray.config import Config, CriticConfig, OptimConfig
from mimkd_ray.models.build_model import build_model
from mimkd_ray.train.cuda_graphs import WARM
from mimkd_ray.train.distributed import first_said
from mimkd_ray.train.engine.engines import CapturedEngine, make_engine
from mimkd_ray.train.engine.evaluation import evaluate_together
from mimkd_ray.train.engine.restart import resume, save
from mimkd_ray.train.engine.student import lone_student
from mimkd_ray.train.networks.device_settings import captures, why_plain
from mimkd_ray.train.records import checkpoint

STEPS = WARM + 3


def _queue(lanes: int) -> Config:
    """Collectives for a queue and running statistics, after the optimiser's step."""
    loss = {"negatives": "queue", "queue": 40, "critic": CriticConfig(kind="concat", width=8), "kd_weight": 0.5}
    train = {"lanes": lanes, "lane_batch": 6, "epochs": 9, "ema_decay": 0.9}
    config = tiny_config(train=train, loss=loss, data={"subset": 40})
    return replace(config, optim=OptimConfig(name="adamw", lr=0.002, clip_norm=1.0))


def _step(lanes: int) -> Config:
    """A collective for negatives of other lanes, before the first of them."""
    return tiny_config(
        train={"lanes": lanes, "lane_batch": 6, "epochs": 9}, loss={"negatives": "step"}, data={"subset": 40}
    )


def _drawing(lanes: int) -> Config:
    """With dropout: of three lanes the first worker has two, and gives up."""
    config = _step(lanes)
    return replace(config, student=replace(config.student, name="test_packed:Dropping"))


CASES: dict[str, tuple[Callable[[int], Config], int, bool]] = {
    "queue": (_queue, 2, True),
    "uneven": (_queue, 3, True),
    "step": (_step, 4, True),
    "unused": (with_unused, 2, True),
    "each draws": (_drawing, 2, True),
    "one gives up": (_drawing, 3, False),
}


def _train(context: LocalContext, config: Config, stops: tuple[int, ...], folder: Path) -> dict[str, Tensor]:
    """Weights, statistics and losses after the last of ``stops``, and at each a new start, by turns captured and
    plain."""
    seen: dict[str, Any] = {"losses": []}
    for turn, stop in enumerate(stops):
        torch.manual_seed(7)
        own = config if turn % 2 == 0 else replace(config, train=replace(config.train, engine="plain"))
        student = lone_student(own, tiny_data(own), build_model("cifar/resnet8", 10), context)
        start = resume(student, str(folder)) if turn else 0
        engine = make_engine([student])
        student.inputs.start(start)
        for step in range(start, stop):
            seen["losses"].append(engine.step([student], step)[student].log["loss"].double())  # type: ignore[union-attr]
        if len(stops) > 1:
            writer = checkpoint.Writer(str(folder), 2, lambda _: None) if context.rank == 0 else None
            save(student, stop, writer)
            if writer is not None:
                writer.wait()
            dist.barrier()
        seen["recorded"] = torch.tensor(isinstance(engine, CapturedEngine) and engine.recorded is not None)
        seen["has DDP"] = torch.tensor(isinstance(student.model, DistributedDataParallel))
        engine.close()
    seen["losses"] = torch.stack(seen["losses"])
    averages = student.weights() if student.ema is not None else {}
    return seen | student.distiller.state_dict() | {f"average of {name}": value for name, value in averages.items()}


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    context = LocalContext(torch.device("cpu"), rank, world)
    assert first_said("" if rank == 0 else "I cannot") == "I cannot"
    assert first_said("") == ""
    found: dict[str, Any] = {}
    for name, (make, lanes, _) in CASES.items():
        config = make(lanes)
        found[name] = [_train(context, one, (STEPS,), Path()) for one in (config, captured(config))]
    config = captured(_queue(2))
    found["resumed"] = _train(context, config, (WARM + 1, WARM + 2, STEPS), Path(folder) / "run")
    found["auto"] = why_plain(replace(config, train=replace(config.train, engine="auto")), torch.device("cuda"))
    found["gloo"] = why_plain(config, torch.device("cuda"))
    found["evaluations"] = [
        engine
        for engine in ("auto", "plain", "captured")
        if captures(replace(config.train, engine=engine), torch.device("cuda"))
    ]
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(_rank, (2, str(folder)), 2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found.keys() - {"recorded", "has DDP"}:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("name", CASES)
def test_captured_steps_equal_plain_ones(ranks: list[dict[str, Any]], name: str) -> None:
    for seen in ranks:
        plain, graph = seen[name]
        assert plain["has DDP"]
        assert not plain["recorded"]
        assert bool(graph["recorded"]) is CASES[name][2]
        assert bool(graph["has DDP"]) is not CASES[name][2], "DDP takes over where steps are not captured"
        same(graph, plain)
    first, second = (seen[name][1] for seen in ranks)
    assert not torch.equal(first["losses"], second["losses"]), "each worker has its own lanes"


def test_either_goes_on_from_the_other(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        same(seen["resumed"], seen["queue"][0])


def test_who_is_captured(ranks: list[dict[str, Any]]) -> None:
    assert "--train.engine captured" in ranks[0]["auto"]
    assert "by gloo" in ranks[0]["gloo"]
    assert ranks[0]["evaluations"] == ["captured"], "by default neither steps nor evaluations of several workers"


@pytest.fixture
def group_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one worker, as Ray and torchrun form it, whose collectives fail."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective of one worker")

    with monkeypatch.context() as patch:
        for name in ("all_reduce", "broadcast", "broadcast_object_list", "all_gather", "all_gather_object"):
            patch.setattr(dist, name, refuse)
        yield
    dist.destroy_process_group()


@pytest.mark.parametrize("make", [_queue, _step])
def test_a_group_of_one_counts_as_none(group_of_one: None, make: Callable[[int], Config]) -> None:
    config = make(2)
    context = LocalContext(torch.device("cpu"), 0, 1)
    assert why_plain(config, torch.device("cuda")) == "", "auto captures there too"
    assert captures(config.train, torch.device("cuda"))
    graph, plain = (_train(context, one, (STEPS,), Path()) for one in (captured(config), config))
    assert graph["recorded"]
    assert not plain["recorded"]
    assert not graph["has DDP"]
    assert not plain["has DDP"]
    same(graph, plain)
    student = lone_student(captured(config), tiny_data(config), build_model("cifar/resnet8", 10), context)
    assert student.summed is None
    evaluate_together([student])[student]
    save(student, 0, None)
