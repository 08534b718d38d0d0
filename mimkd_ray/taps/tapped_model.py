"""Taps: reading the features of named layers of an unmodified network, and turning them into maps and vectors.

A tap is named by a module's path for its output, and by the path and `@input` for its input: `stage3.0.relu` is the
output of that activation, `stage3.0.relu@input` its input. `find_shapes` returns the shapes of taps without data;
`TappedModel` returns the taps next to the logits; `to_map` and `to_vector` convert the layouts of networks (tokens,
channels last) to one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mimkd_ray.errors import UserError, nearest
from mimkd_ray.models.outputs import describe, logits_from
from mimkd_ray.taps.dry_run import BATCH, INPUT, Call, DryRun, dry_run, overwrites_input

MOST_PREFIX_TOKENS = 16
"""Most class and register tokens that are recognised in front of a token grid."""


@dataclass(frozen=True)
class TapShape:
    """The shape of a tap for one image."""

    name: str
    """Name of the tap: the layer's module path, followed by `@input` for the layer's input."""
    kind: Literal["vector", "map", "tokens"]
    """vector (B, C); map (B, C, H, W), or (B, H, W, C) if channels_last; tokens (B, prefix + H * W, C)."""
    channels: int
    height: int = 1
    width: int = 1
    prefix: int = 0
    """Class and register tokens in front of the grid (tokens only)."""
    channels_last: bool = False
    """True for a map of shape (B, H, W, C), as in Swin transformers."""

    @property
    def locations(self) -> int:
        """Number of places of the grid, height x width; 1 for a vector."""
        return self.height * self.width

    @property
    def values_per_image(self) -> int:
        """Number of values of the tap per image, including class and register tokens."""
        return self.channels * (self.locations + self.prefix)


def find_shapes(
    model: nn.Module,
    image_size: int,
    names: Iterable[str] | None = None,
    channels: int = 3,
    run: DryRun | None = None,
) -> dict[str, TapShape]:
    """Return the shapes of taps by name, for square images of `image_size` pixels. PATH is a layer's output, PATH@input
    its input.

    Runs one dry forward pass in eval mode, unless `run` is one; the model is left unchanged. Without `names`: the
    output of every layer that can be tapped, in the order in which they finish. For a layer that is called several
    times, the last call counts.
    Raises UserError for a layer that does not exist or does not run, for an output or a first positional argument that
    is not one tensor of rank 2 to 4, and for one that is overwritten in place afterwards, so that a tap would hold
    other values. The input of an activation that itself works in place, such as the nn.ReLU(inplace=True) of
    torchvision's networks, is allowed: `TappedModel` keeps a copy of it.
    """
    run = run or dry_run(model, image_size, channels)
    if names is not None:
        return {name: tap_shape(model, run, name) for name in names}
    shapes = {call.path: shape_of(call, run.side) for call in run.calls.values() if not run.overwritten(call)}
    return {path: shape for path, shape in shapes.items() if shape is not None}


def shape_of(call: Call, side: int) -> TapShape | None:
    """Return the shape of a dry call's tensor; None if it is not a vector, map or token grid of square images."""
    size = tuple(call.tensor.shape)
    if size[:1] != (BATCH,):
        return None
    if len(size) == 2:
        return TapShape(call.path, "vector", size[1])
    if len(size) == 3:
        for prefix in range(min(MOST_PREFIX_TOKENS, size[1] - 1) + 1):
            grid = math.isqrt(size[1] - prefix)
            if grid * grid == size[1] - prefix:
                return TapShape(call.path, "tokens", size[2], grid, grid, prefix)
    if len(size) == 4:
        # Images are square here, so a grid is square; (B, C, H, W) if both layouts are possible.
        if size[1] == size[2] != size[3]:
            return TapShape(call.path, "map", size[3], size[1], size[2], channels_last=True)
        return TapShape(call.path, "map", size[1], size[2], size[3])
    return None


def _keep(store: dict[str, Tensor], name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    """Store a module's output under a name, as a forward hook."""
    store[name] = output


def _keep_input(store: dict[str, Tensor], name: str, module: nn.Module, args: Any) -> None:
    """Store a module's first positional argument, as a forward pre-hook; as a copy if the module overwrites it."""
    store.pop(name, None)
    if args and isinstance(args[0], Tensor):
        store[name] = args[0].clone() if overwrites_input(module) else args[0]


def _watch(module: nn.Module, store: dict[str, Tensor], name: str) -> RemovableHandle:
    if layer_of(name) == name:
        return module.register_forward_hook(partial(_keep, store, name))  # a partial, so that a hooked model pickles
    return module.register_forward_pre_hook(partial(_keep_input, store, name))


class TappedModel(nn.Module):
    """An unmodified network whose forward also returns the outputs (PATH) and inputs (PATH@input) of named layers.

    forward: images (B, 3, H, W) -> (logits (B, classes), {name: tap as the layer returned it, or was given it}, in
    the order of `names`). The logits are found by `logits_of` in what the network returns. A tap is the network's own
    tensor, not a copy: check names with `find_shapes` first, which refuses what is overwritten later. The exception
    is the input of a layer with `inplace` set, such as nn.ReLU(inplace=True): it would turn into the layer's output,
    so the tap is a copy, with its gradient; that takes the memory of one more map and the time to copy it. A layer
    that is called several times yields its last call.

    Hooks are set here, so construct it before torch.compile and DDP. `model` is the network itself: export its
    state_dict. `release()` removes the hooks. Raises UserError for a name that the network does not have.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(dict.fromkeys(names))
        self._store: dict[str, Tensor] = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        for path in map(layer_of, self.names):
            if not path or path not in modules:
                raise UserError(_unknown(model, path))
        self._handles = [_watch(modules[layer_of(name)], self._store, name) for name in self.names]

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Map images (B, 3, H, W) to logits (B, classes) and the taps by name."""
        self._store.clear()
        logits = logits_from(self.model, images)
        if len(self._store) != len(self.names):
            missing = next(name for name in self.names if name not in self._store)
            path = layer_of(missing)
            more = "" if path == missing else ", or was given no tensor as its first argument"
            raise UserError(f"layer {path!r} of {describe(self.model)} did not run in this forward pass{more}")
        taps = {name: self._store[name] for name in self.names}
        # The store must not keep activations (and their graph) alive between steps.
        self._store.clear()
        return logits, taps

    def release(self) -> None:
        """Remove the hooks from the network, which may then be used or wrapped elsewhere."""
        for handle in self._handles:
            handle.remove()
        self.names = ()


def to_map(tap: Tensor, shape: TapShape) -> Tensor:
    """Return a tap as a map (B, C, H, W), a view if possible, without class and register tokens.

    Raises UserError for a vector, which has no locations.
    """
    if shape.kind == "vector":
        raise UserError(
            f"layer {shape.name!r} returns a vector of {shape.channels} values, not a map: use it for a "
            f"vector term, or name a layer before the pooling"
        )
    if shape.kind == "tokens":
        grid = tap[:, shape.prefix :].transpose(1, 2)
        return grid.unflatten(2, (shape.height, shape.width))
    return tap.permute(0, 3, 1, 2) if shape.channels_last else tap


def to_vector(tap: Tensor, shape: TapShape) -> Tensor:
    """Return a tap as a vector (B, C): a map's mean over locations, the class token, or the mean of all tokens."""
    if shape.kind == "vector":
        return tap
    if shape.kind == "tokens":
        return tap[:, 0] if shape.prefix else tap.mean(dim=1)
    return tap.mean(dim=(1, 2) if shape.channels_last else (2, 3))


def layer_of(tap: str) -> str:
    """Return the module path in a tap's name: the part before `@input`, or all of it."""
    return tap.removesuffix(INPUT)


def tap_shape(model: nn.Module, run: DryRun, name: str) -> TapShape:
    """Return the shape of a tap in a dry run of its model. Raises the errors of `find_shapes`."""
    who, path = describe(model), layer_of(name)
    of_input = path != name
    does, side = ("is given", "input") if of_input else ("returns", "output")
    call = (run.inputs if of_input else run.calls).get(path)
    if call is None:
        other = (run.other_inputs if of_input else run.others).get(path)
        if other is not None:
            instead = f"its output, {path!r}, or a layer inside it" if of_input else "a layer inside it"
            raise UserError(
                f"layer {path!r} of {who} {does} {other}, and only a single floating tensor can "
                f"be tapped: name {instead}, or the block around it"
            )
        if path and path in dict(model.named_modules(remove_duplicate=False)):
            raise UserError(
                f"layer {path!r} of {who} exists, but is not called in a forward pass: "
                f"name a layer that is{_hint(model)}"
            )
        raise UserError(_unknown(model, path))
    if run.overwritten(call):
        raise UserError(
            f"layer {path!r} of {who}: what follows overwrites its {side} in place, so the tap would hold "
            f"other values than the layer {'was given' if of_input else 'returned'}; {_instead(run, call, of_input)}"
        )
    shape = shape_of(call, run.side)
    if shape is None:
        raise UserError(
            f"layer {path!r} of {who} {does} a tensor of shape {tuple(call.tensor.shape)} for {BATCH} "
            f"images of {run.side}x{run.side}: neither a vector, a map nor a square grid of tokens with "
            f"up to {MOST_PREFIX_TOKENS} tokens before it: name another layer{_hint(model)}"
        )
    return shape


def _instead(run: DryRun, call: Call, of_input: bool) -> str:
    """Return advice on another tap for a tensor that is overwritten: the same values at the input of a layer that works
    in place, or a later layer that returns the tensor's final state; else the nearest layer."""
    path = layer_of(call.path)
    same = next((other.path for other in run.inputs.values() if other.copied and other.key == call.key), None)
    if same and of_input:
        return f"name {same!r} instead, which keeps a copy of these values"
    if of_input:
        return f"name the layer's output, {path!r}, or a layer before it"
    copy = f", or {same!r}, which keeps a copy of these values" if same else ""
    for other in run.calls.values():
        final = other.tensor is call.tensor or other.tensor._base is call.tensor
        if other.order > call.order and final and not run.overwritten(other):
            return f"name {other.path!r} instead, which returns it afterwards{copy}"
    block = path.rpartition(".")[0]
    around = f"the block around it, {block!r}, or the activation after it" if block else "the layer after it"
    return f"name {around}{copy}"


def _unknown(model: nn.Module, name: str) -> str:
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    close = nearest(name, paths) or ";"
    return f"layer {name!r} not found in {describe(model)}{close} {len(paths)} names{_hint(model)}"


def _hint(model: nn.Module) -> str:
    name = getattr(model, "zoo_name", None)
    return f": run `python -m mimkd_ray layers {name}`" if name else ": see model.named_modules()"
