from __future__ import annotations

import torch
from tiny_run import cpu, tiny_config, tiny_data
from torch import nn

from mimkd_ray.models.zoo import build_model
from mimkd_ray.train.engine.student import lone_student
from mimkd_ray.train.networks.student_module import LaneNorms, Normalizer


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
