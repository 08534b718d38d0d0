"""Default taps: the stages of a network and its penultimate vector, found in a dry forward pass.

`default_taps` names the layers' outputs, `before_activation` the same features before their activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from mimkd_ray.errors import UserError
from mimkd_ray.models.outputs import describe
from mimkd_ray.taps.dry_run import DROPOUT, Call, DryRun, dry_run
from mimkd_ray.taps.tapped_model import TapShape, shape_of, tap_shape

_POOLING = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AvgPool1d, nn.AvgPool2d,
    nn.MaxPool1d, nn.MaxPool2d,
)  # fmt: skip
_ACTIVATIONS = (
    nn.ReLU, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Threshold, nn.Softplus, nn.Softsign, nn.Sigmoid, nn.Hardsigmoid,
    nn.LogSigmoid, nn.Tanh,
)  # fmt: skip
"""Modules that change every value separately. (ReLU6 is a Hardtanh.)"""
LARGE_IMAGE = 64
"""Smallest image side for which stages finer than a quarter of the image (stems before the first stage) are left
out."""


@dataclass(frozen=True)
class Stages:
    """The layers at which to tap a network, as module paths."""

    maps: tuple[str, ...]
    """Layers that return maps or token grids, shallow to deep."""
    vector: str
    """Layer of the penultimate representation, read through `to_vector`."""


@dataclass(frozen=True, eq=False)
class _Found:
    """A call that can be tapped, with its shape."""

    call: Call
    shape: TapShape

    @property
    def side(self) -> int:
        return self.shape.height


def default_taps(model: nn.Module, image_size: int, run: DryRun | None = None) -> Stages:
    """Return the stages of a classifier for square images of `image_size` pixels, of which `run` may be a dry run.

    A network may give them itself in an attribute `default_stages` (maps, then the vector), as the CIFAR networks do.
    Otherwise each spatial resolution has one stage: the layer that finished last among those inside the fewest blocks,
    by its shortest name (so `layer1`, not `layer1.1.relu`). Resolutions that differ by less than a third count as one,
    and a resolution whose layer is a pooling is left out. For images of 64 pixels and more, stages finer than a quarter
    of the image are left out. A network with a single resolution (ViT) has its blocks at the four quarters as stages.
    Layers whose output is overwritten in place are never chosen. `vector` is the last layer before the classifier that
    returns a vector or a 1x1 map; without one, the last layer that can be tapped (mean over its places, or class
    token). Raises UserError if there is no map at all.
    """
    own = getattr(model, "default_stages", None)
    if own:
        return Stages(tuple(own[:-1]), own[-1])
    run = run or dry_run(model, image_size)
    body = _before_head(run)
    usable = [_Found(call, shape) for call in body if (shape := _tappable(run, call)) is not None]
    grids = [found for found in usable if found.shape.kind != "vector" and found.side > 1]
    maps = _per_resolution(grids, image_size)
    if len({found.side for found in grids}) == 1:
        maps = _quarters(grids) or maps
    if not maps:
        raise UserError(
            f"no layer of {describe(model)} returns a map larger than 1x1 for images of "
            f"{image_size}x{image_size}: name the taps, or use larger images"
        )
    return Stages(tuple(found.call.path for found in maps), _vector(run, body, usable) or maps[-1].call.path)


def before_activation(
    model: nn.Module, image_size: int, names: Sequence[str], run: DryRun | None = None
) -> dict[str, str]:
    """Return the taps of the same features before their activation, by the names of the taps in `names`. `run` may be a
    dry run of the model.

    If a layer's output is the output of an activation module, itself or one inside it, such as `stage3.0.relu` of
    `stage3`, the tap is the input of that module, `stage3.0.relu@input`, of the same shape. Otherwise it is the layer
    itself: its output is not activated (the stages of wide resnets and MobileNetV2, a pooled vector), or it is
    activated by a function call, which cannot be detected (torch.nn.functional.relu). An activation that works in place
    has such a tap too: `TappedModel` copies its input. The names are paths of layers, such as those of `default_taps`;
    a tap of an input is returned unchanged. Raises UserError for a name that cannot be tapped.
    """
    run = run or dry_run(model, image_size)
    return {name: _before_activation(model, run, name) for name in names}


def _before_activation(model: nn.Module, run: DryRun, name: str) -> str:
    shape = tap_shape(model, run, name)
    call = run.calls.get(name)
    if call is None:
        return name  # the input of a layer
    for other in reversed(run.calls.values()):
        if isinstance(other.module, _ACTIVATIONS) and other.key == call.key and other.path in run.inputs:
            before = run.inputs[other.path]
            found = _tappable(run, before)
            # If the output was reshaped after the activation, its input is not the same feature: a map instead of a
            # vector.
            if found is not None and replace(found, name=name) == shape:
                return before.path
    return name


def _tappable(run: DryRun, call: Call) -> TapShape | None:
    shape = None if run.overwritten(call) else shape_of(call, run.side)
    return shape if shape is not None and shape.height == shape.width else None


def _before_head(run: DryRun) -> list[Call]:
    """Return the calls that finished before the classifier, the last layer with parameters of its own.

    That layer counts as the classifier only if it returns one value per class; everything after it (activation,
    pooling) belongs to it.
    """
    calls = list(run.calls.values())
    classes = run.logits.shape[1] if run.logits.dim() == 2 else None
    for number in range(len(calls) - 1, -1, -1):
        call = calls[number]
        if next(call.module.parameters(recurse=False), None) is not None:
            shape = shape_of(call, run.side)
            if shape is None or shape.channels != classes:
                return calls
            # Some networks average several classifiers (DeiT's class and distillation heads).
            while number and isinstance(twin := calls[number - 1].module, nn.Linear) and twin.out_features == classes:
                number -= 1
            return calls[:number]
    return calls


def _per_resolution(grids: list[_Found], image_size: int) -> list[_Found]:
    """Return the last of the outermost layers of each resolution, fine to coarse."""
    finest = image_size / 4 if image_size >= LARGE_IMAGE else image_size
    sides = {found.side for found in grids}
    if any(side <= finest for side in sides):
        sides = {side for side in sides if side <= finest}
    trunks = _trunks(grids)
    outer: list[tuple[_Found, int]] = []
    for side in sorted(sides, reverse=True):
        depths = [(found, _nesting(found, trunks)) for found in grids if found.side == side]
        least = min(depth for _, depth in depths)
        outer.append(([found for found, depth in depths if depth == least][-1], least))
    chosen: list[_Found] = []
    for number, (last, depth) in enumerate(outer):
        # A fine grid deep inside a coarse stage is not a stage: attention weights look like a map.
        if any(other.call.order < last.call.order and less <= depth for other, less in outer[number + 1 :]):
            continue
        names = [found for found in grids if found.call.key == last.call.key]
        if any(isinstance(found.call.module, _POOLING) for found in names):
            continue
        if chosen and last.side > chosen[-1].side * 2 / 3:
            chosen.pop()
        chosen.append(_shortest(names))
    return chosen


def _trunks(grids: list[_Found]) -> set[str]:
    """Return the paths of the containers that hold a pyramid of three resolutions or more; a block holds one or two."""
    sides: dict[str, set[int]] = {}
    for found in grids:
        sides.setdefault(_parent(found.call.path), set()).add(found.side)
    return {path for path, held in sides.items() if len(held) >= 3}


def _nesting(found: _Found, trunks: set[str]) -> int:
    """Return the number of blocks that contain the layer: its ancestors, less the root and the trunks."""
    depth = 0
    path = _parent(found.call.path)
    while path:
        depth += path not in trunks
        path = _parent(path)
    return depth


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _shortest(group: list[_Found]) -> _Found:
    """Return, of several names for one tensor, the one nearest to the root; the first of equals."""
    return min(group, key=lambda found: found.call.path.count("."))


def _quarters(grids: list[_Found]) -> list[_Found]:
    """Return the last block of each quarter of the longest run of equal blocks (siblings of one class and shape); of
    equals the outermost, as the four projections of an attention are such a run too."""
    runs: dict[tuple[object, ...], list[_Found]] = {}
    for found in grids:
        shape = found.shape
        if isinstance(found.call.module, nn.Identity):  # a block has several where nothing is dropped or scaled
            continue
        runs.setdefault((_parent(found.call.path), type(found.call.module), shape.kind, shape.channels), []).append(
            found
        )
    blocks = max(runs.values(), key=lambda run: (len(run), -run[0].call.path.count(".")), default=[])
    if len(blocks) < 4:
        return []
    return [blocks[len(blocks) * quarter // 4 - 1] for quarter in (1, 2, 3, 4)]


def _vector(run: DryRun, body: list[Call], usable: list[_Found]) -> str | None:
    """Return the path of the penultimate representation, None if the last layers cannot be tapped."""
    by_path = {found.call.path: found for found in usable}
    for call in reversed(body):
        shape = shape_of(call, run.side)
        if shape is None:
            continue
        grid = shape.kind != "vector" and shape.locations > 1
        same = [found for found in usable if found.call.key == call.key]
        same = [found for found in same if not isinstance(found.call.module, (*DROPOUT, nn.Identity))]
        if grid:
            # There is no vector between the last map and the classifier: use the map itself, unless it is overwritten.
            return _shortest(same).call.path if same else None
        if call.path in by_path and same:
            return _shortest(same).call.path
    return None
