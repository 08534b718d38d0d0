"""Taps: reading the output of named layers of an unmodified network, and turning it into maps and vectors.

`find_shapes` says what a layer returns without running data; `TappedModel` returns it next to the logits;
`to_map` and `to_vector` undo the layouts that networks differ in (tokens, channels last).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from mimkd_ray.errors import UserError, nearest
from mimkd_ray.models.dry_run import BATCH, Call, DryRun, describe, dry_run

MOST_PREFIX_TOKENS = 16
"""Up to this many class and register tokens are recognised in front of a token grid."""


@dataclass(frozen=True)
class TapShape:
    """What a tapped layer returns for one image."""

    name: str
    """Module path of the layer."""
    kind: Literal["vector", "map", "tokens"]
    """vector (B, C); map (B, C, H, W), or (B, H, W, C) if channels_last; tokens (B, prefix + H * W, C)."""
    channels: int
    height: int = 1
    width: int = 1
    prefix: int = 0
    """Class and register tokens in front of the grid (tokens only)."""
    channels_last: bool = False
    """The map is (B, H, W, C), as in Swin transformers."""

    @property
    def locations(self) -> int:
        """Places of the grid, height x width; 1 for a vector."""
        return self.height * self.width

    @property
    def values_per_image(self) -> int:
        """Numbers that the layer returns per image, class and register tokens included."""
        return self.channels * (self.locations + self.prefix)


def find_shapes(
    model: nn.Module, image_size: int, names: Iterable[str] | None = None, channels: int = 3
) -> dict[str, TapShape]:
    """Shapes of the named layers' outputs (module path -> shape) for square images of `image_size` pixels.

    One dry forward in eval mode; the model is left as it was. Without `names`: every layer that can be
    tapped, in the order in which they finish. A layer that is called several times counts with its last
    call. Raises UserError for a name that does not exist, does not run, does not return one tensor of rank
    2 to 4, or whose output is overwritten in place by what follows.
    """
    run = dry_run(model, image_size, channels)
    if names is not None:
        return {name: _checked(model, run, name) for name in names}
    shapes = {call.path: shape_of(call, run.side) for call in run.calls.values() if not run.overwritten(call)}
    return {path: shape for path, shape in shapes.items() if shape is not None}


def shape_of(call: Call, side: int) -> TapShape | None:
    """The shape of a dry call's output; None where it is no vector, map or token grid of square images."""
    size = tuple(call.output.shape)
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
        # Images are square here, so a grid is square; (B, C, H, W) where both readings would do.
        if size[1] == size[2] != size[3]:
            return TapShape(call.path, "map", size[3], size[1], size[2], channels_last=True)
        return TapShape(call.path, "map", size[1], size[2], size[3])
    return None


class _Keep:
    """A forward hook that stores a module's output under a name; a class, so that a hooked model pickles."""

    def __init__(self, store: dict[str, Tensor], name: str) -> None:
        self.store = store
        self.name = name

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.store[self.name] = output


class TappedModel(nn.Module):
    """An unmodified network whose forward also returns the outputs of named layers.

    forward: images (B, 3, H, W) -> (logits (B, classes), {name: tap as the layer returned it}, in the order
    of `names`). A tap is the layer's own tensor, not a copy: check names with `find_shapes` first, which
    refuses layers whose output is overwritten later. A layer that is called several times yields its last
    call.

    Hooks are set here, so construct it before torch.compile and DDP. `model` is the network itself: export
    its state_dict. `release()` takes the hooks off. Raises UserError for a name that the network does not
    have.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(dict.fromkeys(names))
        self._store: dict[str, Tensor] = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        for name in self.names:
            if not name or name not in modules:
                raise UserError(_unknown(model, name))
        self._handles = [modules[name].register_forward_hook(_Keep(self._store, name)) for name in self.names]

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, 3, H, W) -> logits (B, classes) and the taps by name."""
        self._store.clear()
        logits = self.model(images)
        if len(self._store) != len(self.names):
            missing = [name for name in self.names if name not in self._store]
            raise UserError(f"layer {missing[0]!r} of {describe(self.model)} did not run in this forward pass")
        taps = {name: self._store[name] for name in self.names}
        # The store must not keep activations (and their graph) alive between steps.
        self._store.clear()
        return logits, taps

    def release(self) -> None:
        """Take the hooks off the network, which may then be used or wrapped elsewhere."""
        for handle in self._handles:
            handle.remove()
        self.names = ()


def to_map(tap: Tensor, shape: TapShape) -> Tensor:
    """A tap as a map (B, C, H, W), a view where possible; class and register tokens are set apart.

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
    """A tap as a vector (B, C): a map's mean over locations, the class token, or the mean of all tokens."""
    if shape.kind == "vector":
        return tap
    if shape.kind == "tokens":
        return tap[:, 0] if shape.prefix else tap.mean(dim=1)
    return tap.mean(dim=(1, 2) if shape.channels_last else (2, 3))


def _checked(model: nn.Module, run: DryRun, name: str) -> TapShape:
    who = describe(model)
    call = run.calls.get(name)
    if call is None:
        if name in run.others:
            raise UserError(
                f"layer {name!r} of {who} returns {run.others[name]}, and only a single floating tensor can "
                f"be tapped: name a layer inside it, or the block around it"
            )
        if name and name in dict(model.named_modules(remove_duplicate=False)):
            raise UserError(
                f"layer {name!r} of {who} exists, but is not called in a forward pass: "
                f"name a layer that is{_hint(model)}"
            )
        raise UserError(_unknown(model, name))
    if run.overwritten(call):
        raise UserError(
            f"layer {name!r} of {who}: what follows overwrites its output in place, so the tap would hold "
            f"other values than the layer returned; {_instead(run, call)}"
        )
    shape = shape_of(call, run.side)
    if shape is None:
        raise UserError(
            f"layer {name!r} of {who} returns a tensor of shape {tuple(call.output.shape)} for {BATCH} "
            f"images of {run.side}x{run.side}: neither a vector, a map nor a square grid of tokens with "
            f"up to {MOST_PREFIX_TOKENS} tokens before it: name another layer{_hint(model)}"
        )
    return shape


def _instead(run: DryRun, call: Call) -> str:
    """The first later layer that returns the same tensor in its final state; else the block around."""
    for other in run.calls.values():
        same = other.output is call.output or other.output._base is call.output
        if other.order > call.order and same and not run.overwritten(other):
            return f"name {other.path!r} instead, which returns it afterwards"
    block = call.path.rpartition(".")[0]
    return f"name the block around it, {block!r}, or the activation after it" if block else "name the layer after it"


def _unknown(model: nn.Module, name: str) -> str:
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    close = nearest(name, paths) or ";"
    return f"layer {name!r} not found in {describe(model)}{close} {len(paths)} names{_hint(model)}"


def _hint(model: nn.Module) -> str:
    name = getattr(model, "zoo_name", None)
    return f": run `python -m mimkd_ray layers {name}`" if name else ": see model.named_modules()"
