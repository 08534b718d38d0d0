"""One forward pass without data, which records the inputs and outputs of every module of a network and their order.

It runs on the meta device (shapes without values) on a copy that shares nothing with the model. If a network cannot run
there, it runs on the model's own device; buffers and random state are restored. So do networks for small images on a
CPU: the networks of CIFAR took a ninth of the time, or less, that the meta device takes for their shapes.
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

from mimkd_ray.errors import UserError
from mimkd_ray.models.outputs import describe, logits_of
from mimkd_ray.models.train_or_eval import in_mode

BATCH = 2
"""Images of a dry run: two, so that the batch dimension cannot be mistaken for a dimension of size one."""

SMALL = 64
"""Largest side of images with which a network on a CPU runs there. Measured at 8 and 32 pixels; at 224 ResNets took
three times as long as on the meta device, and a ViT seven times."""

INPUT = "@input"
"""Suffix of a module's path that names the module's first positional argument instead of its output."""

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True, eq=False)
class Call:
    """The last call of one module, seen at its output or at its input."""

    path: str
    """Name of the tap: the module's path, followed by `@input` for the input."""
    module: nn.Module
    tensor: Tensor
    """Output or input of the module."""
    version: int
    """The tensor's in-place version at that moment."""
    order: int
    """Number of the call in the order of all recorded calls."""
    copied: bool = False
    """True if a tap keeps a copy (see `overwrites_input`), which later changes of the tensor do not affect."""

    @property
    def key(self) -> tuple[int, int, int]:
        """Key that is equal for two calls that saw the same values: one memory, one version, one size."""
        return (_memory(self.tensor), self.version, self.tensor.numel())


@dataclass(frozen=True, eq=False)
class DryRun:
    """What a dry forward saw. The root module (path "") is not among the calls."""

    model: nn.Module
    side: int
    calls: dict[str, Call]
    """Path -> last call, in the order in which the modules finished; single floating tensors only."""
    others: dict[str, str]
    """Path -> kind of the module's output, if that was not one floating tensor (e.g. "tuple")."""
    inputs: dict[str, Call]
    """Path of the module -> its input in its last call; single floating tensors only."""
    other_inputs: dict[str, str]
    """Path of the module -> its first positional argument, where that was not one floating tensor."""
    output: Any
    """What the network returned."""
    dropped: frozenset[int]
    """Memories that an in-place dropout would overwrite in training (in the dry run it does nothing)."""

    @property
    def logits(self) -> Tensor:
        """The logits in `output`. Raises UserError where there are none."""
        return logits_of(self.model, self.output)

    def overwritten(self, call: Call) -> bool:
        """Return True if a tap of the tensor would not keep its values: they change in place, in this pass or in
        training."""
        return not call.copied and (call.tensor._version != call.version or _memory(call.tensor) in self.dropped)


def dry_run(model: nn.Module, image_size: int, channels: int = 3, training: bool = False) -> DryRun:
    """Run two zero images (2, channels, image_size, image_size) through `model`, no gradients, in eval mode or, where
    `training`, in training mode.

    Training mode, parameters, buffers and random state are restored. Raises UserError if the network does not take such
    images.
    """
    tensors = list(itertools.chain(model.parameters(), model.buffers()))
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())
    shape = (BATCH, channels, image_size, image_size)
    if device.type != "meta" and (device.type != "cpu" or image_size > SMALL):
        # A network that cannot run on the meta device runs on its own.
        with contextlib.suppress(Exception), _kept(model, device):
            return _forward(_on_meta(model), torch.zeros(shape, dtype=dtype, device="meta"), training)
    try:
        with _kept(model, device):
            return _forward(model, torch.zeros(shape, dtype=dtype, device=device), training)
    except UserError:
        raise
    except Exception as error:  # the network is foreign code: its error is the message
        raise UserError(
            f"{describe(model)} failed on a dry run with images of {channels}x{image_size}x{image_size}: "
            f"{str(error) or type(error).__name__}; pass the image size that it was made for"
        ) from error


def overwrites_input(module: nn.Module) -> bool:
    """Return whether a module declares that it works in place, like nn.ReLU(inplace=True); a tap of its input is a
    copy."""
    return bool(getattr(module, "inplace", False))


def _forward(model: nn.Module, images: Tensor, training: bool) -> DryRun:
    calls: dict[str, Call] = {}
    others: dict[str, str] = {}
    inputs: dict[str, Call] = {}
    other_inputs: dict[str, str] = {}
    dropped: set[int] = set()
    count = itertools.count()

    def record(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # A module's last call counts, so an earlier one is removed to keep the finish order.
            calls.pop(path, None)
            others.pop(path, None)
            if isinstance(output, Tensor) and output.is_floating_point():
                calls[path] = Call(path, module, output, output._version, next(count))
            else:
                others[path] = _kind(output)

        return hook

    def record_input(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs.pop(path, None)
            other_inputs.pop(path, None)
            given = args[0] if args else None
            if isinstance(given, Tensor) and given.is_floating_point():
                copied = overwrites_input(module)
                inputs[path] = Call(path + INPUT, module, given, given._version, next(count), copied)
            else:
                other_inputs[path] = f"{_kind(given)} as its first argument" if args else "no positional argument"

        return hook

    def note_dropout(module: nn.Module, args: tuple[Any, ...]) -> None:
        dropped.update(_memory(value) for value in args if isinstance(value, Tensor))

    handles = []
    # Modules may have several names; each name counts.
    for path, module in model.named_modules(remove_duplicate=False):
        if path:
            handles.append(module.register_forward_pre_hook(record_input(path)))
            handles.append(module.register_forward_hook(record(path)))
        if isinstance(module, DROPOUT) and module.inplace and module.p > 0:
            handles.append(module.register_forward_pre_hook(note_dropout))
    try:
        with torch.no_grad(), in_mode(training, model):
            output = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return DryRun(model, images.shape[-1], calls, others, inputs, other_inputs, output, frozenset(dropped))


def _kind(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _on_meta(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters and buffers are meta tensors; no weight is copied."""
    twins: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        twins[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        twins[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, twins)


@contextlib.contextmanager
def _kept(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore buffers and random state after the with-block."""
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
    """Return an identity of the memory behind a tensor, the same for its views. (Meta tensors have no address.)"""
    return tensor.untyped_storage()._cdata
