"""Gradients of several workers without DDP, for steps that a CUDA graph holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mimkd_ray.train.distributed import all_max, all_sum, from_first, world_size


class SummedGradients:
    """The gradients of a module, averaged over all workers in one collective after the last lane of a step.

    DDP starts its collectives in hooks of the backward pass and walks through the graph on the host. Arithmetic is
    DDP's (train/networks/student_module.py): every gradient is divided by the number of workers and then summed, a
    parameter without a gradient here counts as zeros, and one that has none anywhere keeps none. Which these are is
    asked on the host, and not while a step is recorded: it is then as in the step before.
    """

    def __init__(self, module: nn.Module) -> None:
        """All workers begin with the first one's parameters and buffers, as with DDP."""
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.used: list[nn.Parameter] = []
        for tensor in (*module.parameters(), *module.buffers()):
            from_first(tensor.detach())

    @torch.no_grad()
    def average(self) -> None:
        """Average the gradients of all workers. Memory: as much again, for the time of it."""
        on_gpu = self.parameters[0].is_cuda
        if not (on_gpu and torch.cuda.is_current_stream_capturing()):
            anywhere = all_max([int(parameter.grad is not None) for parameter in self.parameters])
            self.used = [one for one, known in zip(self.parameters, anywhere, strict=True) if known]
        grads: list[Tensor] = []
        for parameter in self.used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
        flat = torch.cat([grad.flatten() for grad in grads]).mul_(1 / world_size())
        parts = all_sum(flat).split([grad.numel() for grad in grads])
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.view_as(grad))
