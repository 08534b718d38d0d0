from __future__ import annotations

import copy
from typing import Any

import torch
from tiny_run import cpu, tiny_config, tiny_data
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mimkd_ray.models.build_model import build_model
from mimkd_ray.train.engine.student import lone_student
from mimkd_ray.train.networks.student_module import LaneNorms, Normalizer


class Operations(TorchDispatchMode):
    """Lists the operations that are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_normalizer_is_torchvisions() -> None:
    from torchvision.transforms.v2.functional import normalize, to_dtype

    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for channels_last in (False, True):
        ours = Normalizer(mean, std, torch.device("cpu"), torch.float32, channels_last)(images)
        expected = normalize(to_dtype(images, torch.float32, scale=True), list(mean), list(std))
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
        assert ours.is_contiguous(memory_format=torch.channels_last) is channels_last


def test_running_statistics_are_the_average_of_lanes_that_each_start_alike() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    norm(torch.randn(4, 3, 2, 2))  # somewhere else than at the start
    lanes = [torch.randn(4, 3, 2, 2) * (k + 1) + k for k in range(3)]
    start_mean, start_var = norm.running_mean.clone(), norm.running_var.clone()
    means = [0.9 * start_mean + 0.1 * lane.mean((0, 2, 3)) for lane in lanes]
    variances = [0.9 * start_var + 0.1 * lane.var((0, 2, 3), unbiased=True) for lane in lanes]

    keeper = LaneNorms(norm, 3, 3)
    keeper.begin_step()
    for lane in lanes:
        norm(lane)
        keeper.end_lane()
    keeper.end_step()
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0))


def test_statistics_of_lanes_take_as_many_operations_for_many_layers_as_for_one() -> None:
    counts = []
    for layers in (1, 5):
        network = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(layers)))
        norms = LaneNorms(network, 2, 2)
        with Operations() as seen:
            norms.begin_step()
            norms.end_lane()
            norms.end_step()
        counts.append(len(seen.names))
    assert counts[0] == counts[1]


def test_a_moving_average_follows_in_one_operation_without_its_counter() -> None:
    """On a GPU update_parameters waits for the step, to bring its counter there; the numbers are the same."""
    config = tiny_config(train={"ema_decay": 0.9})
    student = lone_student(config, tiny_data(config), build_model("cifar/resnet8", 10), cpu())
    assert student.ema is not None
    student.step(0)
    expected = copy.deepcopy(student.ema)
    with torch.no_grad():
        for parameter in student.distiller.student.parameters():
            parameter.add_(0.1)
    expected.update_parameters(student.distiller.student)
    with Operations() as seen:
        student.follow()
    assert [name for name in seen.names if name not in ("add_", "_local_scalar_dense", "detach")] == ["_foreach_lerp_"]
    for found, told in zip(student.ema.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, told)
    assert student.ema.n_averaged == expected.n_averaged == 2
    with student.settled():
        for found, told in zip(student.ema.module.buffers(), student.distiller.student.buffers(), strict=True):
            assert torch.equal(found, told)


def test_the_gradient_of_a_step_is_the_mean_over_its_lanes() -> None:
    config = tiny_config(train={"precision": "float64", "lanes": 3})
    data, teacher = tiny_data(config), build_model("cifar/resnet8", 10)
    student = lone_student(config, data, teacher, cpu())
    reference = lone_student(config, data, teacher, cpu())
    student.optimizer.step = lambda *_: None  # type: ignore[method-assign, assignment]
    student.step(0)

    grads: list[list[torch.Tensor]] = []
    for lane in reference.inputs.step(0):
        reference.distiller.zero_grad()
        loss, _ = reference.distiller(lane.images_BCHW, lane.labels_B, lane.ids_B, lane.teacher)
        loss.backward()
        grads.append([p.grad.clone() for p in reference.distiller.parameters()])
    for parameter, *lanes in zip(student.distiller.parameters(), *grads, strict=True):
        torch.testing.assert_close(parameter.grad, torch.stack(lanes).mean(0), rtol=1e-10, atol=1e-12)


def test_gradients_reach_student_and_critics_and_never_the_teacher() -> None:
    config = tiny_config()
    teacher = build_model("cifar/resnet8", 10)
    student = lone_student(config, tiny_data(config), teacher, cpu())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student.step(0)
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.distiller.student.parameters())
    silent = [n for n, p in student.distiller.loss.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert all(name.endswith("bias") for name in silent), silent  # b cancels in InfoNCE
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), f"the teacher's {name} changed"
