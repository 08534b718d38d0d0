from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import start_ranks
from tiny_run import cpu, tiny_config, tiny_data

from mimkd_ray.config import DataConfig
from mimkd_ray.data.loading.batches import LaneBatch
from mimkd_ray.data.loading.loader import eval_batches
from mimkd_ray.errors import DamagedDataError, UserError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.train.engine.evaluation import evaluate_together
from mimkd_ray.train.engine.student import lone_student
from mimkd_ray.train.held_out.accuracy import GRADIENT_IMAGES, accuracy, held_out_name
from mimkd_ray.train.networks.student_module import Normalizer


def _normalizer() -> Normalizer:
    return Normalizer((0.0,) * 3, (1.0,) * 3, torch.device("cpu"), torch.float32, False)


def _batch(rows: int, damaged: tuple[str, ...] = ()) -> LaneBatch:
    generator = torch.Generator().manual_seed(rows)
    images = torch.randint(0, 256, (rows, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return LaneBatch(0, 0, images, torch.arange(rows) % 7, torch.arange(rows), 0, damaged)


def _logits(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)[:, :7]


def test_against_a_slow_count() -> None:
    batches = [_batch(5), _batch(8), _batch(1)]
    top1 = top5 = rows = 0
    total = 0.0
    for batch in batches:
        for image, label in zip(batch.images_BCHW, batch.labels_B, strict=True):
            logits = image.flatten()[:7].double() / 255
            order = sorted(range(7), key=lambda k: -float(logits[k]))
            top1 += order[0] == int(label)
            top5 += int(label) in order[:5]
            total += float(logits.exp().sum().log() - logits[label])
            rows += 1
    measured = accuracy(_logits, batches, _normalizer())
    assert measured.rows == rows == 14
    assert measured.top1 == pytest.approx(100 * top1 / rows)
    assert measured.top5 == pytest.approx(100 * top5 / rows)
    assert measured.cross_entropy == pytest.approx(total / rows, rel=1e-5)


def test_too_many_damaged_images_stop_the_run() -> None:
    six = tuple(f"{name}.jpg" for name in "uvwxyz")
    with pytest.raises(DamagedDataError, match=r"6 of 14 .*u\.jpg"):
        accuracy(_logits, [_batch(8, six)], _normalizer(), max_damaged=0.1)
    assert accuracy(_logits, [_batch(8, six)], _normalizer(), max_damaged=0.5).damaged == 6


def test_a_damaged_image_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """A run of 100 epochs has 100 evaluations, which all meet it."""
    for _ in range(2):
        accuracy(_logits, [_batch(8, ("named once.jpg",))], _normalizer(), max_damaged=0.5)
    assert caplog.text.count("damaged held-out image left out: named once.jpg") == 1


def test_a_handful_of_damaged_images_does_not() -> None:
    assert accuracy(_logits, [_batch(8, ("x.jpg",))], _normalizer(), max_damaged=0.001).damaged == 1
    with pytest.raises(DamagedDataError, match="1 of 9"):
        accuracy(_logits, [_batch(8, ("x.jpg",))], _normalizer(), max_damaged=0.0)


@pytest.mark.parametrize("batches", [[], [_batch(0)], [_batch(0, ("x.jpg", "y.jpg"))]])
def test_a_set_without_images_is_named_with_the_remedy(batches: list[LaneBatch]) -> None:
    damaged = sum(len(batch.damaged) for batch in batches)
    said = (
        rf"validation set of data \(data.val_split 'test'\) gave no images.* {damaged} .*--data\.val-split.*--data\.ho"
    )
    name = held_out_name(DataConfig(root="data", val_split="test"))
    with pytest.raises(UserError, match=said):
        accuracy(_logits, batches, _normalizer(), max_damaged=1.0, name=name)


def test_the_held_out_set_is_named_in_a_run() -> None:
    """Of a holdout, all of whose images are damaged and may be so."""
    config = tiny_config(data={"holdout": 0.1, "max_damaged": 1.0}, loss={"preset": "paper"})
    student = lone_student(config, tiny_data(config), build_model("cifar/resnet8", 10), cpu())
    student.inputs.held_out = lambda _: iter([_batch(0, ("x.jpg",))])  # type: ignore[method-assign]
    with pytest.raises(
        UserError, match=r"held-out part of digits \(data.holdout 0.1 of split 'train'\) gave no images"
    ):
        evaluate_together([student])[student]


def _measured(rank: int, world: int) -> tuple[float, ...]:
    torch.manual_seed(0)
    model = build_model("cifar/resnet8_w4", 10).eval()
    batches = eval_batches(tiny_data().val, DataConfig(image_size=8), 64, rank, world)
    return tuple(accuracy(model, batches, _normalizer()))


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(_measured(rank, world), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_every_number_of_workers_measures_the_same(tmp_path: Path) -> None:
    """450 held-out rows over 4 workers: uneven slices, uneven batches, one result."""
    alone = _measured(0, 1)
    start_ranks(_rank, (4, str(tmp_path)), 4)
    for rank in range(4):
        other = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert other[:2] == alone[:2]
        assert other[2] == pytest.approx(alone[2], rel=1e-6)
        assert other[3] == alone[3] == 450


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_an_evaluation_keeps_no_activations(ema_decay: float) -> None:
    """Counted by weak references to what the tapped layers of the evaluated network return."""
    config = tiny_config(train={"ema_decay": ema_decay, "information_rows": 0})
    student = lone_student(config, tiny_data(config), build_model("cifar/resnet8", 10), cpu())
    layers = dict(student.exported().named_modules())
    names = student.distiller.student.names
    seen: list[weakref.ref[torch.Tensor]] = []
    handles = [layers[name].register_forward_hook(lambda m, i, out: seen.append(weakref.ref(out))) for name in names]
    evaluate_together([student])[student]
    assert len(seen) == 3 * len(names) > 0, "450 rows in batches of 150"
    assert not [ref for ref in seen if ref() is not None]
    for handle in handles:
        handle.remove()


def test_information_is_read_over_all_pairs_in_evaluation_mode_and_leaves_no_trace() -> None:
    config = tiny_config(
        loss={"preset": "paper"}, data={"subset": 100}, train={"lane_batch": 50, "information_rows": 450}
    )
    student = lone_student(config, tiny_data(config), build_model("cifar/resnet8", 10), cpu())
    state = {name: value.clone() for name, value in student.distiller.state_dict().items()}
    frozen = student.exported().get_submodule("stem.1").eval()
    graphs: list[int] = []
    layer = dict(student.exported().named_modules())["stage3"]
    handle = layer.register_forward_hook(lambda m, i, out: graphs.append(len(out)) if out.requires_grad else None)
    values = evaluate_together([student])[student]
    handle.remove()
    assert graphs == [GRADIENT_IMAGES] == [32], "no graph of the other images of the batch, nor of any other batch"
    assert student.distiller.training
    assert not frozen.training, "a batch norm that was frozen stays so"
    for name, value in student.distiller.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(parameter.grad is None for parameter in student.distiller.parameters())

    # The same reading by hand: DV over all off-diagonal pairs of each batch, weighted by its rows.
    student.distiller.eval()
    total = torch.zeros(())
    assert student.inputs.teacher is not None
    for batch in student.inputs.held_out(50):
        images = student.inputs.normalize(batch.images_BCHW)
        with torch.no_grad():
            teacher = student.inputs.teacher.features(images).vectors["pool"]
            _, taps = student.distiller.student(images)
            critic = student.distiller.loss.critics[0]
            a, b = critic.embed_student(taps["pool"]), critic.embed_teacher(teacher)
            scores = a @ b.T / 0.1
            off = scores[~torch.eye(len(scores), dtype=torch.bool)]
            nats = scores.diagonal().mean() - off.logsumexp(0) + torch.tensor(float(len(off))).log()
            total += nats * len(batch)
    assert values["global/pool-pool/nats"] == pytest.approx(float(total) / 450, rel=1e-4)

    # And the gradient of a term on the first 32 images, as a run of so few would have it.
    first = next(student.inputs.held_out(32))
    images = student.inputs.normalize(first.images_BCHW)
    seen = student.inputs.teacher.features(images)
    output, _ = student.distiller.output(images, first.labels_B, first.ids_B, seen, reading=True)
    for name in ("ce", "feature/stage3-stage3"):
        student.distiller.zero_grad()
        output.terms[name].backward(retain_graph=True)
        grads = [p.grad.flatten() for p in student.distiller.student.parameters() if p.grad is not None]
        assert values[f"{name}/grad_norm"] == pytest.approx(float(torch.cat(grads).norm()), rel=1e-4)
        assert values[f"{name}/grad_norm"] > 0
