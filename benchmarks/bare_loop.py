"""The least that a captured step can be: the same networks and the same loss in one CUDA graph, without lanes, resume,
checkpoints, metrics or a data loader. What the product's step is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from mimkd_ray import distill
from mimkd_ray.config import Config
from mimkd_ray.models.build_model import build_model

WARM_STEPS = 3


def bare_step(config: Config, images_NCHW: Tensor, labels_N: Tensor) -> Callable[[], None]:
    """Return a function that takes the next step: on a GPU a replay, on a CPU a call.

    Crop, flip and normalisation are on the device. ``images_NCHW`` are uint8. Every step is of the next rows.
    """
    device, data, size = images_NCHW.device, config.data, config.data.image_size
    batch = config.train.lane_batch
    networks = [
        build_model(name, data.num_classes, "random", size) for name in (config.teacher.name, config.student.name)
    ]
    distiller = distill(networks[0], networks[1], image_size=size, loss=config.loss)
    distiller.to(device).train()
    networks[0].to(device)
    for network in networks:
        network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        distiller.parameters(),
        lr=0.05,
        momentum=0.9,
        weight_decay=5e-4,
        **({"fused": True} if device.type == "cuda" else {}),
    )
    mean = torch.tensor(data.mean, device=device).view(3, 1, 1)
    std = torch.tensor(data.std, device=device).view(3, 1, 1)
    rows_B = torch.arange(batch, device=device)

    def step() -> None:
        rows_B.add_(batch).remainder_(len(images_NCHW))
        images = images_NCHW[rows_B].float().div_(255).sub_(mean).div_(std)
        images = _crop_and_flip(images).to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = distiller(images, labels_N[rows_B], rows_B.clone())
        optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        optimizer.step()
        distiller.after_step()

    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_STEPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def _crop_and_flip(images_BCHW: Tensor) -> Tensor:
    """Return the images shifted by up to four pixels, and every other one of them mirrored, by random numbers of the
    device."""
    batch, _, height, width = images_BCHW.shape
    device = images_BCHW.device
    padded = torch.nn.functional.pad(images_BCHW, (4, 4, 4, 4))
    y_BH = torch.randint(0, 9, (batch, 1), device=device) + torch.arange(height, device=device)
    x_BW = torch.randint(0, 9, (batch, 1), device=device) + torch.arange(width, device=device)
    x_BW = torch.where(torch.rand(batch, 1, device=device) < 0.5, x_BW.flip(1), x_BW)
    rows_B11 = torch.arange(batch, device=device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[rows_B11, y_BH[:, :, None], x_BW[:, None, :]].permute(0, 3, 1, 2)


def bare_seconds(config: Config, images_NCHW: Tensor, labels_N: Tensor, steps: int) -> float:
    """Return the seconds of a step of the bare loop."""
    step = bare_step(config, images_NCHW, labels_N)
    for _ in range(WARM_STEPS):
        step()
    _wait(images_NCHW.device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    _wait(images_NCHW.device)
    return (time.perf_counter() - began) / steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
