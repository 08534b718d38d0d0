"""`distill` in a loop of one's own: what it trains, what it keeps, and that it trains what a run trains."""

from __future__ import annotations

import copy
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs_here import TAKES_LONG
from ranks import start_ranks
from tiny_run import cpu, tiny_config, tiny_data
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mimkd_ray import console
from mimkd_ray.config import Config, CriticConfig, LossConfig
from mimkd_ray.errors import UserError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.seeds import derive
from mimkd_ray.train import distiller as module
from mimkd_ray.train.distiller import Distiller, distill
from mimkd_ray.train.engine.inputs import Lane
from mimkd_ray.train.engine.step import optimisation_step, seed_lane
from mimkd_ray.train.engine.student import Student, lone_student
from mimkd_ray.train.networks.build import build_student
from mimkd_ray.train.networks.optim import build_optimizer, learning_rate

CONCAT = LossConfig(
    preset="two_sided", local_weight=0.0, feature_weight=0.0, critic=CriticConfig(kind="concat", width=8)
)


def networks(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    return build_model("cifar/resnet8", 10), build_model("cifar/resnet8_w4", 10)


def some_distiller(loss: LossConfig | None = None, **options: Any) -> Distiller:
    return distill(*networks(), image_size=8, loss=loss or LossConfig(queue=64), **options)


def batch(size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.randint(0, 10, (size,), generator=generator)


def run_config(**sections: dict[str, Any]) -> Config:
    """Five epochs of six steps in float64, with the queue."""
    sections["train"] = {"lanes": 1, "precision": "float64", "epochs": 5, "seed": 3} | sections.get("train", {})
    sections["loss"] = {"preset": "accuracy", "queue": 64} | sections.get("loss", {})
    return tiny_config(**sections)


def student_and_distiller(config: Config) -> tuple[Student, Distiller, torch.optim.Optimizer]:
    """A student in training, and a distiller of the same start with the same kind of optimiser."""
    torch.manual_seed(7)
    teacher = build_model("cifar/resnet8", 10).double()
    trained = lone_student(config, tiny_data(config), copy.deepcopy(teacher), cpu())
    student = build_student(config, 10).double()
    torch.manual_seed(derive(config.train.seed, "critics"))
    steps = trained.order.steps_per_epoch
    own = distill(teacher, student, 8, config.loss, steps=steps * config.train.epochs, epoch_steps=steps)
    return trained, own, build_optimizer(config.optim, own)


def own_step(
    own: Distiller | DistributedDataParallel, optimizer: torch.optim.Optimizer, config: Config, step: int, lane: Lane
) -> Tensor:
    """A step of one's own on a lane. Returns its loss."""
    seed_lane(config.train.seed, step, lane.number)
    output = own(lane.images_BCHW, lane.labels_B, lane.ids_B)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config.optim, step, 60 // (config.train.lanes * 10), config.train.epochs)
    optimizer.zero_grad()
    output.total.backward()
    optimizer.step()
    (own.module if isinstance(own, DistributedDataParallel) else own).after_step()
    return output.total.detach()


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"schedule": "rise", "name": ("mimkd", "dkd"), "rival_warmup": 3.0},
        {"preset": "two_sided", "negatives": "all", "locations": 4},
    ],
    ids=["queue", "schedules", "learned"],
)
def test_thirty_steps_have_the_losses_of_a_run(loss: dict[str, Any]) -> None:
    config = run_config(loss=loss)
    trained, own, optimizer = student_and_distiller(config)
    trained.inputs.start(0)
    theirs, ours = [], []
    for step in range(30):
        lanes = list(trained.inputs.step(step))
        trained.schedule(step)
        taken = optimisation_step([trained], lanes, partial(seed_lane, config.train.seed, step))
        theirs.append(float(taken[trained].log["loss"]))
        ours.append(float(own_step(own, optimizer, config, step, lanes[0])))
    assert ours == pytest.approx(theirs, rel=1e-10)
    assert len(set(ours)) == 30


def test_only_student_and_loss_are_trained_and_saved() -> None:
    teacher, student = networks()
    own = distill(teacher, student, 8)
    assert own.student is student
    expected = {id(p) for p in (*student.parameters(), *own.loss.parameters())}
    assert {id(p) for p in own.parameters()} == expected
    assert len(list(own.loss.parameters())) > 0
    theirs = {value.data_ptr() for value in teacher.state_dict().values()}
    assert not theirs & {value.data_ptr() for value in own.state_dict().values()}
    assert {key.split(".")[0] for key in own.state_dict()} == {"student", "loss", "next_id", "steps_taken"}
    assert [key for key in own.state_dict() if key.startswith("student.")] == [
        f"student.{key}" for key in student.state_dict()
    ]


def test_the_teacher_is_frozen_and_stays_in_evaluation_mode() -> None:
    teacher, student = networks()
    own = distill(teacher, student, 8).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    for mode in (own.train, teacher.train):  # the second: a module that holds both calls it
        mode()
        output = own(*batch())
        output.total.backward()
        assert not teacher.training
        assert student.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_parts_sum_to_the_total_and_the_log_has_nats() -> None:
    own = some_distiller()
    output = own(*batch())
    assert set(output.terms) == {"ce", "global/pool-pool", *(f"feature/stage{n}-stage{n}" for n in (1, 2, 3))}
    torch.testing.assert_close(sum(output.terms.values()), output.total)
    assert {"ce", "loss", "global/pool-pool/nats", "global/pool-pool/ceiling"} <= set(output.log)
    assert not any(value.requires_grad for value in output.log.values())
    assert output.logits.shape == (8, 10)


def test_named_pairs_take_the_place_of_chosen_ones() -> None:
    own = some_distiller(pairs={"global": ["logits:pool", "pool:pool:0.5"], "feature": ["stage3:stage2"]})
    assert [term.name for term in own.loss.plan] == ["global/logits-pool", "global/pool-pool", "feature/stage3-stage2"]
    assert [term.weight for term in own.loss.plan] == [10.0, 5.0, 3.0]


def test_without_ids_no_image_was_seen_before() -> None:
    """With the same ids an image's own vector is no negative of it; a counter's ids never meet."""
    images, labels = batch()
    for ids, negatives in ((torch.arange(8), 14), (None, 15)):
        own = some_distiller(LossConfig(queue=64, same_class="keep"))
        own(images, labels, ids)
        own.after_step()
        ceiling = own(images, labels, ids).log["global/pool-pool/ceiling"]
        assert float(ceiling) == pytest.approx(torch.tensor(1.0 + negatives).log().item())


@pytest.mark.parametrize("loss", [LossConfig(queue=64), CONCAT], ids=["queue", "concat"])
def test_a_batch_in_evaluation_mode_leaves_nothing_behind(loss: LossConfig) -> None:
    own = some_distiller(loss)
    before = {name: value.clone() for name, value in own.loss.named_buffers()}
    own.eval()
    own(*batch())
    own.read(*batch())
    own.after_step()
    for name, value in own.loss.named_buffers():
        assert torch.equal(value, before[name]), name


def test_a_batch_in_training_mode_enters_the_queue() -> None:
    own = some_distiller()
    own.train()
    own(*batch())
    own.after_step()
    assert int(own.loss.queue.filled_Q.sum()) == 8


def test_reading_is_over_all_pairs_and_locations() -> None:
    loss = LossConfig(preset="paper")  # trains with one negative and reads with all
    log = some_distiller(loss).eval().read(*batch())
    own = some_distiller(loss).eval()
    labels, ids = own._checked(*batch(), None)
    teacher, student, _ = own._features(batch()[0])
    expected = own.loss(teacher, student, labels, ids, reading=True).log
    assert log.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(log[key], value)
    assert "global/pool-pool/nats" in log


def test_steps_may_have_several_batches_of_different_sizes() -> None:
    """The queue and the means are those of all their images, in the order seen."""
    own, whole = some_distiller(), some_distiller()
    images, labels = batch(20)
    for rows in (slice(0, 8), slice(8, 16), slice(16, 20)):
        own(images[rows], labels[rows], torch.arange(20)[rows])
    own.after_step()
    whole(images, labels, torch.arange(20))
    whole.after_step()
    for name, value in whole.loss.named_buffers():
        torch.testing.assert_close(dict(own.loss.named_buffers())[name], value, msg=name)
    assert own.step == 1

    # The concat critic's statistics are the mean of those of each batch, as a step of its own would leave them.
    own, *alone = (some_distiller(CONCAT) for _ in range(4))
    for rows, single in zip((slice(0, 8), slice(8, 16), slice(16, 20)), alone, strict=True):
        for each in (own, single):
            each(images[rows], labels[rows], torch.arange(20)[rows])
        single.after_step()
    own.after_step()
    for critics in zip(*(each.loss.critics for each in (own, *alone)), strict=True):
        for ours, *theirs in zip(*(critic.standard for critic in critics), strict=True):
            torch.testing.assert_close(ours.moments_2C, sum(one.moments_2C for one in theirs) / 3)


def descend(own: Any, step: int) -> float:
    """Take a step of plain gradient descent on the step's batch; return its loss."""
    torch.manual_seed(step)
    output = own(*batch(seed=step))
    own.zero_grad()
    output.total.backward()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter -= 0.01 * parameter.grad
    own.after_step()
    return float(output.total.detach())


def test_a_loaded_state_goes_on_where_it_was() -> None:
    loss, options = LossConfig(queue=64, schedule="fall"), {"steps": 6}
    whole = some_distiller(loss, **options)
    resumed = distill(*networks(), 8, loss, steps=6)
    losses: list[float] = []
    for own, steps in ((whole, range(6)), (resumed, range(3, 6))):
        for step in steps:
            if own is whole and step == 3:
                state = copy.deepcopy(whole.state_dict())
            if own is resumed and step == 3:
                resumed.load_state_dict(state)
                assert resumed.step == 3
            losses.append(descend(own, step))
    assert losses[6:] == losses[3:6]


def test_released_networks_keep_nothing() -> None:
    teacher, student = networks()
    own = distill(teacher, student, 8)
    own.release()
    with pytest.raises(UserError, match="released"):
        own(*batch())
    seen = []
    for network in (teacher, student):
        last = dict(network.named_modules())["pool"]
        last.register_forward_hook(lambda _module, _args, output: seen.append(weakref.ref(output)))
        with torch.no_grad():
            network(batch()[0])
    assert [ref() for ref in seen] == [None, None]


def test_autocast_is_the_callers() -> None:
    own = some_distiller()
    dtypes = []
    for network in (own.student, own._teacher[0].model):
        network.get_submodule("pool").register_forward_hook(lambda _module, _args, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = own(*batch())
    output.total.backward()
    assert dtypes == [torch.bfloat16, torch.bfloat16]
    assert output.logits.dtype == torch.bfloat16
    assert output.total.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in own.parameters() if p.grad is not None)


@TAKES_LONG
def test_compiled_it_gives_the_same_losses() -> None:
    plain = some_distiller(pairs={"feature": ["stage3:stage3"]})
    compiled = torch.compile(copy.deepcopy(plain), backend="aot_eager")
    for step in range(3):
        losses = []
        for own in (plain, compiled):
            losses.append(descend(own, step))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch.equal(plain.loss.queue.ids_Q, compiled.loss.queue.ids_Q)
    assert int(compiled.loss.queue.filled_Q.sum()) == 24


def test_forgotten_bookkeeping_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BATCHES", 2)
    own = some_distiller()
    own(*batch())
    own(*batch())
    with pytest.raises(UserError, match="after_step"):
        own(*batch())


def test_labels_that_nobody_needs_are_left_out() -> None:
    images, labels = batch()
    found = [
        some_distiller(labels="none")(images, given, ids=torch.arange(8)).total.item()
        for given in (None, labels - 20, labels)
    ]
    assert found[0] == found[1] == found[2], "nor does a class say which images are no negatives"


def test_class_numbers_of_any_whole_type() -> None:
    images, labels = batch()
    assert some_distiller()(images, labels.int()).total.item() == some_distiller()(images, labels).total.item()
    own = some_distiller()
    own(images, labels, torch.arange(8, dtype=torch.int32))
    own.after_step()
    assert own.loss.queue.ids_Q[:8].tolist() == list(range(8))


def test_the_teacher_follows_to_float64_and_back() -> None:
    own = some_distiller()
    images, labels = batch()
    single = own(images, labels).total
    double = own.double()(images.double(), labels).total
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=0)
    assert own.float()(images, labels).total.dtype == torch.float32


def test_a_teacher_may_be_in_half_precision() -> None:
    teacher, student = networks()
    images, labels = batch()
    single = distill(teacher, student, 8)(images, labels).total
    half = distill(teacher.bfloat16(), networks()[1], 8)(images, labels).total
    torch.testing.assert_close(half, single, rtol=0.02, atol=0)


def test_a_rank_may_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    own = some_distiller(LossConfig(negatives="step")).eval()
    monkeypatch.setattr(module, "is_distributed", lambda: True)
    monkeypatch.setattr(module, "_of_other_ranks", lambda *_: pytest.fail("the other ranks were asked"))
    assert own.read(*batch(), ids=torch.arange(8))["global/pool-pool/nats"].isfinite()


def test_an_evaluation_mode_that_was_left_on_is_told(caplog: pytest.LogCaptureFixture) -> None:
    console.told.clear()
    own = some_distiller()
    own.train()
    own(*batch())
    own.after_step()
    assert not caplog.text
    own.student.eval()
    own(*batch())
    own.after_step()
    assert "the student is in evaluation mode in a step of training" in caplog.text
    assert "after no batch" not in caplog.text
    own.eval()
    own(*batch())
    own.after_step()
    assert "after_step() after no batch in training mode" in caplog.text


class _Bare(nn.Module):
    """A network that has one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1))


def test_kd_alone_reads_no_layer() -> None:
    teacher, student = networks()
    own = distill(teacher, _Bare(), 8, LossConfig(name=("kd",)))
    output = own(*batch())
    assert set(output.terms) == {"ce", "kd"}
    images, labels = batch()
    logits, of_teacher = own.student(images), teacher.eval()(images)
    soft = nn.functional.kl_div((logits / 4).log_softmax(1), (of_teacher / 4).softmax(1), reduction="batchmean") * 16
    expected = 0.1 * nn.functional.cross_entropy(logits, labels) + 0.9 * soft
    torch.testing.assert_close(output.total, expected)
    assert student is not own.student


def _ranks_config(negatives: str) -> Config:
    return run_config(train={"lanes": 2}, loss={"negatives": negatives})


def _rank(rank: int, world: int, folder: str, negatives: str, compiled: bool) -> None:
    torch.set_num_threads(1)
    config = _ranks_config(negatives)
    trained, own, _ = student_and_distiller(config)  # for its batches: before there is a process group
    trained.inputs.start(0)
    taken = [list(trained.inputs.step(step))[rank] for step in range(4)]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    if compiled:
        torch._dynamo.config.optimize_ddp = False
        own.compile(backend="aot_eager")
    parallel = DistributedDataParallel(own)
    optimizer = build_optimizer(config.optim, own)
    losses = torch.stack([own_step(parallel, optimizer, config, step, lane) for step, lane in enumerate(taken)])
    dist.all_reduce(losses)
    ids = own._new_ids(3)
    queue = own.loss.queue.ids_Q if own.loss.queue is not None else None
    torch.save({"losses": losses / world, "ids": ids, "queue": queue}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("negatives", "compiled"), [("step", False), pytest.param("queue", True, marks=TAKES_LONG)])
def test_two_ranks_under_ddp_train_as_two_lanes_of_a_run(negatives: str, compiled: bool, tmp_path: Path) -> None:
    trained, _, _ = student_and_distiller(_ranks_config(negatives))
    trained.inputs.start(0)
    expected = torch.stack([trained.step(step).log["loss"] for step in range(4)])
    start_ranks(_rank, (2, str(tmp_path), negatives, compiled), 2)
    found = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for rank in found:
        torch.testing.assert_close(rank["losses"], expected, rtol=1e-9, atol=0)
    assert sorted(torch.cat([rank["ids"] for rank in found]).tolist()) == list(range(6)), "ids of ranks never meet"
    if negatives == "queue":
        for rank in found:
            assert torch.equal(rank["queue"], trained.distiller.loss.queue.ids_Q)


def test_labels_of_some_images_or_none() -> None:
    """A negative label has no part in the cross-entropy; with none, the loss is that of the terms alone."""
    torch.manual_seed(0)
    teacher, student = (build_model(name, 10) for name in ("cifar/resnet8", "cifar/resnet8_w4"))
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([3, -1, 5, -1, 0, 9])
    partial = distill(teacher, student, image_size=8, labels="partial")(images, labels)
    logits = student(images)
    expected = torch.nn.functional.cross_entropy(logits[labels >= 0], labels[labels >= 0])
    assert torch.allclose(partial.log["ce"], expected, atol=1e-5)
    nobody = distill(teacher, student, image_size=8, labels="none")(images, torch.full((6,), -1))
    assert float(nobody.log["ce"]) == 0
    assert torch.isfinite(nobody.total)
