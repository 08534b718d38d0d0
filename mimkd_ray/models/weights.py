"""Reading a weights file into a network: .safetensors or PyTorch, local or any fsspec URL; all must fit."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mimkd_ray.errors import UserError
from mimkd_ray.places import place
from mimkd_ray.secret_urls import redacted, revealed, scrubbed

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
"""Endings of weights files; all but the first are read by torch.load with weights_only=True."""
_WRAPPERS = ("state_dict", "model", "student")


def load_weights(model: nn.Module, path: str, num_classes: int, ignore: tuple[str, ...] = ()) -> None:
    """Load the state dict at `path` into `model`, in place; every key and shape must fit.

    Half-precision tensors become the parameters' dtype; keys that start with one of `ignore` are left out.
    Raises UserError for a file that is missing, unreadable or does not fit, in the last case with counts
    and names; a file of another number of classes is called that.
    """
    path = redacted(path)
    state = read_state_dict(path)
    state = {key: value for key, value in state.items() if not key.startswith(ignore or ("\0",))}
    _check(model, state, path, num_classes)
    model.load_state_dict(state)


def read_state_dict(path: str) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU, "module." prefixes taken off. Raises UserError."""
    path = redacted(path)
    if not path.endswith(SUFFIXES):
        raise UserError(f"weights {path!r}: expected 'random', 'published' or a file ending in {', '.join(SUFFIXES)}")
    data = _read(path)
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            state: Any = load(data)
        except SafetensorError as error:
            raise UserError(f"weights {path}: not a readable safetensors file of {len(data)} bytes: {error}") from error
    else:
        try:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            first = str(error).strip().split("\n")[0]
            raise UserError(
                f"weights {path}: not a PyTorch file of plain tensors ({len(data)} bytes): {first}; "
                f"save model.state_dict() with torch.save, or use safetensors"
            ) from error
    return _state_dict(state, path)


def _read(path: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(revealed(place(path)), "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f"weights {path}: no such file; pass an existing file, 'published' or 'random'") from None
    except (OSError, ImportError, ValueError) as error:  # unreachable storage, a protocol without its driver
        told = scrubbed(str(error))
        raise UserError(f"weights {path}: cannot be read: {told}; copy the file here and pass its path") from None


def _state_dict(content: Any, path: str) -> dict[str, Tensor]:
    """The state dict in a file's content: bare, or under one of the usual keys."""
    found = content
    if isinstance(found, Mapping) and not _is_state_dict(found):
        inner = [found[key] for key in _WRAPPERS if isinstance(found.get(key), Mapping)]
        found = inner[0] if inner else found
    if not _is_state_dict(found):
        keys = _some(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise UserError(
            f"weights {path}: no state dict in it (found {keys}); expected names with tensors, bare or under "
            f"one of {', '.join(map(repr, _WRAPPERS))}"
        )
    # Data parallel wrappers add the prefix; it is taken off only where every key has it.
    while all(key.startswith("module.") for key in found):
        found = {key.removeprefix("module."): value for key, value in found.items()}
    return dict(found)


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items())
    )


def _check(model: nn.Module, state: Mapping[str, Tensor], path: str, num_classes: int) -> None:
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    wrong = [key for key in own if key in state and own[key].shape != state[key].shape]
    other = {state[key].shape[0] for key in wrong if _is_head(own[key], state[key], num_classes)}
    if (
        not missing
        and not unexpected
        and len(other) == 1
        and all(_is_head(own[key], state[key], num_classes) for key in wrong)
    ):
        raise UserError(class_mismatch(path, other.pop(), num_classes))
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing keys ({_some(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected keys ({_some(unexpected)})")
    if wrong:
        shapes = [f"{key}: file {_shape(state[key])}, model {_shape(own[key])}" for key in wrong]
        problems.append(f"{len(wrong)} keys of another shape ({_some(shapes)})")
    if problems:
        raise UserError(
            f"weights {path} do not fit this network of {len(own)} tensors: {'; '.join(problems)}; "
            f"pass the network that the file was made from"
        )


def class_mismatch(source: str, found: int, num_classes: int) -> str:
    """The message for weights whose classifier has another number of classes than the data."""
    return (
        f"weights {source} have {found} classes, the data has {num_classes}: "
        f"pass --data.num-classes {found} or other weights"
    )


def _is_head(own: Tensor, given: Tensor, num_classes: int) -> bool:
    """True if the shapes differ as those of a classifier's weight or bias with other classes do."""
    same_rest = own.shape[1:] == given.shape[1:] and own.dim() > 0
    return same_rest and own.shape[0] == num_classes != given.shape[0]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _some(names: Iterable[str], limit: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:limit]) + (", ..." if len(listed) > limit else "")
