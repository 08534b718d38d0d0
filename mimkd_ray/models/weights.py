"""Loading a weights file into a network: names of other people's code are understood, and all must fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mimkd_ray import console
from mimkd_ray.errors import UserError, listed
from mimkd_ray.models.checkpoint_keys import best_fit
from mimkd_ray.models.weights_file import read_states, shown
from mimkd_ray.secret_urls import redacted

logger = logging.getLogger(__name__)
_COUNTER = "num_batches_tracked"
"""Of batch norms: files of PyTorch before 0.4.1, and of other frameworks, do not have it, and nothing here reads it."""


def load_weights(
    model: nn.Module, path: str, num_classes: int, ignore: tuple[str, ...] = (), new_head: bool = False
) -> None:
    """Load the weights file at `path` into `model`, in place; every key and shape must fit.

    Which state dict of the file, without which prefix and by whose names is what agrees best with the network; one
    line says what was done to the names. Half-precision tensors become the parameters' dtype; keys that start with
    one of `ignore` are left out. With `new_head`, a classifier of another number of classes, or none, leaves that of
    `model` as it is, and one line says so. Raises UserError for a file that is missing, unreadable or does not fit, in
    the last case with counts and names; a file of another number of classes is called that.
    """
    path = redacted(path)
    put_state(model, read_states(path), shown(path), num_classes, ignore, new_head)


def put_state(
    model: nn.Module,
    states: Mapping[str, Mapping[str, Tensor]],
    name: str,
    num_classes: int,
    ignore: tuple[str, ...] = (),
    new_head: bool = False,
) -> None:
    """Load what fits best of the state dicts of a file called `name`, as `load_weights` does."""
    own = model.state_dict()
    fit = best_fit(own, states)
    state = {key: value for key, value in fit.state.items() if not key.startswith(ignore or ("\0",))}
    state |= {key: value for key, value in own.items() if key.endswith(_COUNTER) and key not in state}
    if told := fit.told():
        console.say_once(f"weights {name}: {told}")
    kept = _new_head(model, own, state, num_classes) if new_head else []
    if kept:
        classes = {len(state[key]) for key in kept if key in state}
        console.say_once(new_head_line(name, classes.pop() if classes else 0, num_classes))
        state |= {key: own[key] for key in kept}
    _check(own, state, name, num_classes)
    _check_numbers(own, state, name)
    model.load_state_dict(state)


def new_head_line(source: str, found: int, num_classes: int) -> str:
    """Return the line for weights whose classifier, of `found` classes or none, is not taken."""
    had = f"have {found} classes" if found else "have no classifier"
    return f"weights {source} {had}, the data has {num_classes}: the classifier starts anew, all else is loaded"


def _new_head(model: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor], num_classes: int) -> list[str]:
    """Names of the classifier's tensors where they, and only they, differ from the file's in the number of classes or
    are not in it; [] otherwise."""
    differ = [key for key in own if key not in state or state[key].shape != own[key].shape]
    ends = {
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.shape[0] == num_classes
    }
    others = [
        key
        for key in differ
        if key.rpartition(".")[0] not in ends or (key in state and not _is_head(own[key], state[key], num_classes))
    ]
    # Without a classifier in the file only one layer may be missing: more of them is another network.
    missing = {key.rpartition(".")[0] for key in differ if key not in state}
    return [] if others or len(missing) > 1 else differ


def _check(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: str, num_classes: int) -> None:
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
        problems.append(f"{len(missing)} missing keys ({listed(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected keys ({listed(unexpected)})")
    if wrong:
        shapes = [f"{key}: file {_shape(state[key])}, model {_shape(own[key])}" for key in wrong]
        problems.append(f"{len(wrong)} keys of another shape ({listed(shapes)})")
    if problems:
        raise UserError(
            f"weights {path} do not fit this network of {len(own)} tensors: {'; '.join(problems)}; "
            f"pass the network that the file was made from"
        )


def _check_numbers(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: str) -> None:
    """Raise UserError for tensors that are no plain finite numbers of the parameters' kind."""
    for key, given in state.items():
        odd = given.is_quantized or given.layout != torch.strided or given.is_meta
        if odd or (own[key].is_floating_point() and not given.is_floating_point()):
            kind = "quantized" if given.is_quantized else "meta" if given.is_meta else str(given.layout)[6:]
            raise UserError(
                f"weights {path}: {key} is a {kind} tensor of {str(given.dtype)[6:]}, and the network's is of "
                f"{str(own[key].dtype)[6:]}: save plain weights, as before they were quantized or made sparse"
            )
        bad = given.numel() - int(torch.isfinite(given.float()).sum()) if given.is_floating_point() else 0
        if bad:
            raise UserError(
                f"weights {path}: {bad:,} of {given.numel():,} numbers of {key} are NaN or infinite: the training that "
                "made the file had failed; use an earlier checkpoint of it"
            )


def class_mismatch(source: str, found: int, num_classes: int) -> str:
    """Return the message for weights whose classifier has another number of classes than the data."""
    return (
        f"weights {source} have {found} classes, the data has {num_classes}: pass other weights, or --data.num-classes "
        f"{found} for data whose labels are numbers of these; to evaluate on some of them name all with --eval.classes "
        f"FILE; for a teacher with classes of its own pass --teacher.classes {found}"
    )


def _is_head(own: Tensor, given: Tensor, num_classes: int) -> bool:
    """Return True if the shapes differ like those of classifiers with different numbers of classes."""
    same_rest = own.shape[1:] == given.shape[1:] and own.dim() > 0
    return same_rest and own.shape[0] == num_classes != given.shape[0]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
