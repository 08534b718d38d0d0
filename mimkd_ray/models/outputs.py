"""Where a network's logits are in what it returns: a tensor, or a tuple, a dict or an object with tensors in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mimkd_ray.errors import UserError, listed

NAMES = ("logits", "logit", "output", "outputs", "out", "pred", "preds", "prediction", "predictions", "cls", "x")
"""Names that logits have in dicts and in objects, the first that is there."""


def describe(model: nn.Module) -> str:
    """The name by which `build_model` made the network, or its class name."""
    return str(getattr(model, "zoo_name", None) or type(model).__name__)


def logits_of(model: nn.Module, output: Any) -> Tensor:
    """Return the logits (B, classes) in what `model` returned; a tensor is returned as it is.

    Of a dict, a named tuple or an object such as Hugging Face's, what is called logits, output or the like. Of other
    sequences the tensor of rank 2; of several that have as many columns the first, which is the main classifier where
    others are auxiliary; of several widths that of the classes for which `build_model` made the network. Raises
    UserError, naming the network and what there is, where none is or several could be meant.
    """
    if isinstance(output, Tensor):
        return output
    named = _named(output)
    for name in NAMES:
        if _is_logits(named.get(name)):
            return named[name]
    rows = [value for value in named.values() if _is_logits(value)]
    widths = {value.shape[1] for value in rows}
    classes = getattr(model, "zoo_classes", None)
    if len(widths) > 1 and classes in widths:
        rows = [value for value in rows if value.shape[1] == classes]
        widths = {classes}
    if len(widths) == 1:
        return rows[0]
    found = _shown(named) or "nothing"
    why = f"{len(rows)} of them could be logits" if rows else "none of them is a tensor (B, classes)"
    raise UserError(
        f"{describe(model)} returns a {type(output).__name__} of {found}: {why}; return logits (B, classes) alone, or "
        f"as 'logits' in a dict or an object"
    )


def logits_from(model: nn.Module, images: Tensor) -> Tensor:
    """Run the network on images (B, 3, H, W); return its logits (B, classes)."""
    return logits_of(model, model(images))


def _is_logits(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()


def _named(output: Any) -> Mapping[str, Any]:
    """What is in an output, by name; positions are the names in plain sequences."""
    if isinstance(output, Mapping):
        return {str(key): value for key, value in output.items()}
    if hasattr(output, "_asdict"):  # a named tuple
        return dict(output._asdict())
    if isinstance(output, (tuple, list)):
        return {str(number): value for number, value in enumerate(output)}
    return dict(vars(output)) if hasattr(output, "__dict__") else {}


def _shown(named: Mapping[str, Any]) -> str:
    def kind(value: Any) -> str:
        return "x".join(map(str, value.shape)) or "a number" if isinstance(value, Tensor) else type(value).__name__

    return listed((f"{name}: {kind(value)}" for name, value in named.items()), limit=5)
