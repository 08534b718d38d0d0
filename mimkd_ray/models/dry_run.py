"""One forward pass without data: what every module of a network returned, and in which order.

It runs on the meta device (shapes without values, milliseconds) on a copy that shares nothing with the
model, or, where a network cannot run there, on the model's own device; buffers and random state are put back.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from mimkd_ray.errors import UserError

BATCH = 2
"""Images of a dry run: two, so that the batch dimension cannot be taken for a dimension of size one."""


@dataclass(frozen=True, eq=False)
class Call:
    """The last call of one module: its path, its class, what it returned and when it finished (a count)."""

    path: str
    module: nn.Module
    output: Tensor
    version: int
    """The tensor's in-place version when the module returned it."""
    order: int

    @property
    def key(self) -> tuple[int, int, int]:
        """Equal for two calls that returned the same values: one memory, one version, one size."""
        return (_memory(self.output), self.version, self.output.numel())


@dataclass(frozen=True, eq=False)
class DryRun:
    """What a dry forward saw. The root module (path "") is not among the calls; its output is `logits`."""

    side: int
    calls: dict[str, Call]
    """Path -> last call, in the order in which the modules finished; single floating tensors only."""
    others: dict[str, str]
    """Path -> what the module returned, where that was not one floating tensor (e.g. "tuple")."""
    logits: Any
    dropped: frozenset[int]
    """Memories that an in-place dropout would overwrite in training (it does nothing in the dry run)."""

    def overwritten(self, call: Call) -> bool:
        """True if something after the module changes its output in place, in this pass or in training."""
        return call.output._version != call.version or _memory(call.output) in self.dropped


def dry_run(model: nn.Module, image_size: int, channels: int = 3) -> DryRun:
    """Run two zero images (2, channels, image_size, image_size) through `model` in eval mode, no gradients.

    Training mode, parameters, buffers and random state are afterwards what they were. Raises UserError if the
    network does not take such images.
    """
    tensors = list(itertools.chain(model.parameters(), model.buffers()))
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())
    shape = (BATCH, channels, image_size, image_size)
    if device.type != "meta":
        # Whatever a network does that has no meta form, its own device can tell.
        with contextlib.suppress(Exception), _kept(model, device):
            return _forward(_on_meta(model), torch.zeros(shape, dtype=dtype, device="meta"))
    try:
        with _kept(model, device):
            return _forward(model, torch.zeros(shape, dtype=dtype, device=device))
    except UserError:
        raise
    except Exception as error:  # the network is foreign code: its error is the message
        raise UserError(
            f"{describe(model)} failed on a dry run with images of {channels}x{image_size}x{image_size}: "
            f"{error}; pass the image size that it was made for"
        ) from error


def describe(model: nn.Module) -> str:
    """The name by which `build_model` made the network, or its class name."""
    return str(getattr(model, "zoo_name", None) or type(model).__name__)


def _forward(model: nn.Module, images: Tensor) -> DryRun:
    calls: dict[str, Call] = {}
    others: dict[str, str] = {}
    dropped: set[int] = set()
    count = itertools.count()

    def record(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # A module's last call counts, so an earlier one is taken out to keep the finish order.
            calls.pop(path, None)
            others.pop(path, None)
            if isinstance(output, Tensor) and output.is_floating_point():
                calls[path] = Call(path, module, output, output._version, next(count))
            elif isinstance(output, Tensor):
                others[path] = f"a tensor of {output.dtype}"
            else:
                others[path] = type(output).__name__

        return hook

    def note_dropout(module: nn.Module, args: tuple[Any, ...]) -> None:
        dropped.update(_memory(value) for value in args if isinstance(value, Tensor))

    handles = []
    # Modules may have several names; each name counts.
    for path, module in model.named_modules(remove_duplicate=False):
        if path:
            handles.append(module.register_forward_hook(record(path)))
        if isinstance(module, _DropoutNd) and module.inplace and module.p > 0:
            handles.append(module.register_forward_pre_hook(note_dropout))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            logits = model(images)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return DryRun(images.shape[-1], calls, others, logits, frozenset(dropped))


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are meta tensors; no weight is copied on the way."""
    twins: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        twins[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        twins[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, twins)


@contextlib.contextmanager
def _kept(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put buffers and random state back afterwards."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _memory(tensor: Tensor) -> int:
    """Names the memory behind a tensor, the same for its views. (Meta tensors have no address.)"""
    return tensor.untyped_storage()._cdata
