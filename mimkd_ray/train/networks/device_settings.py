"""How networks run on a device: precision, memory format, kernels, CUDA graphs, the compiler."""

from __future__ import annotations

import shutil
from typing import TypeGuard

import torch
import torch.distributed as dist
from torch import nn

from mimkd_ray.config import Config, TrainConfig
from mimkd_ray.train.distributed import is_distributed


def autocast_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """Type of autocast, or None."""
    if config.precision == "bf16":
        return torch.bfloat16
    gains = config.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if gains else None


def teacher_autocast(config: Config, device: torch.device) -> torch.dtype | None:
    """Type of autocast of the teacher: that of the student, unless ``cache.precision`` says otherwise."""
    if config.cache.precision == "auto":
        return autocast_dtype(config.train, device)
    return torch.bfloat16 if config.cache.precision == "bf16" else None


def parameter_dtype(config: TrainConfig) -> torch.dtype:
    """Type of parameters and images."""
    return torch.float64 if config.precision == "float64" else torch.float32


def uses_channels_last(config: TrainConfig, device: torch.device) -> bool:
    """Return whether images and kernels are channels-last.

    By default on a CPU too, where a step of most networks is 1.15 to 1.35 times as fast so (ShuffleNetV2 at 32 px: 0.87
    times) and inference 1.13 to 1.7 times: benchmarks/layout.py.
    """
    if config.channels_last == "auto":
        return device.type != "cpu" or config.precision != "float64"
    return config.channels_last == "on"


def captures(config: TrainConfig, device: torch.device) -> bool:
    """Return whether GPU work, steps and evaluations, is to be recorded as CUDA graphs, where that is possible."""
    return config.engine == "captured" or (config.engine == "auto" and device.type == "cuda" and not is_distributed())


def why_plain(config: Config, device: torch.device) -> str:
    """Return why steps are not to be captured (train/engine/engines.py), for people; "" where they are."""
    if not captures(config.train, device):
        several = config.train.engine == "auto" and device.type == "cuda"
        return (
            "there are several workers (--train.engine captured records their steps too)"
            if several
            else f"train.engine is {config.train.engine}"
        )
    if is_distributed() and device.type == "cuda" and dist.get_backend() != "nccl":
        return f"gradients of several workers are summed by {dist.get_backend()}, which no graph holds"
    if config.loss.resolved_negatives == "cache":
        return "loss.negatives is cache"
    return ""


def choose_kernels(config: TrainConfig, device: torch.device) -> None:
    """Let a GPU choose the fastest convolutions for the run's shapes, and, where the networks compute in bf16, multiply
    float32 matrices (of losses) with TF32's 10 bits, which is still more than the features have. Holds for the whole
    process."""
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high" if autocast_dtype(config, device) is torch.bfloat16 else "highest")


def has_compiler() -> bool:
    """Return whether torch.compile's default backend finds a C++ compiler."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def place(model: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """Move a network to the device, in the run's type and memory format."""
    model = model.to(device, parameter_dtype(config))
    if not uses_channels_last(config, device):
        return model
    model = model.to(memory_format=torch.channels_last)
    for layer in model.modules():
        if device.type == "cpu" and _damages_memory(layer):
            layer.weight.data = layer.weight.data.clone(memory_format=torch.contiguous_format)
            layer.register_forward_pre_hook(_channels_first)
    return model


def _damages_memory(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Say whether the gradient of these weights would be written beyond its memory on a CPU where the input is
    channels-last: https://github.com/uxlfoundation/oneDNN/issues/6035, of shortcuts of narrow networks."""
    if not isinstance(layer, nn.Conv2d) or layer.in_channels // layer.groups >= 16:
        return False
    return layer.kernel_size == (1, 1) and max(layer.stride) > 1


def _channels_first(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(each.clone(memory_format=torch.contiguous_format) for each in inputs)  # of one channel too
