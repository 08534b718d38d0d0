"""The classes that a teacher and the data have in common, where the teacher's head means others than the data's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mimkd_ray.config import LossConfig
from mimkd_ray.errors import UserError
from mimkd_ray.losses.methods.registry import RIVALS


@dataclass(frozen=True)
class SharedClasses:
    """Columns of the teacher's logits and of the student's, in pairs of one meaning, in the order of the data's."""

    of_teacher: tuple[int, ...] = ()
    of_data: tuple[int, ...] = ()

    def teacher_as_data(self, logits_BT: Tensor, num_classes: int) -> Tensor:
        """Return the teacher's logits in the columns of the data's classes; those that it lacks are minus infinity."""
        columns_BC = logits_BT.new_full((len(logits_BT), num_classes), float("-inf"))
        columns_BC[:, list(self.of_data)] = logits_BT[:, list(self.of_teacher)]
        return columns_BC


def names_of(text: str) -> set[str]:
    """The names by which a class is known: "tench, Tinca tinca" has three, the whole and both parts."""
    return {_plain(part) for part in (text, *text.split(","))} - {""}


def match(teacher: Sequence[str], data: Sequence[str]) -> SharedClasses:
    """Pair classes that have a name in common; whole names go first. A class that several of the other side could be is
    left out."""
    whole = _unique([{_plain(name)} for name in teacher])
    parts = _unique([names_of(name) for name in teacher])
    pairs: list[tuple[int, int]] = []
    for column, name in enumerate(data):
        found = {whole[_plain(name)]} if _plain(name) in whole else {parts[n] for n in names_of(name) if n in parts}
        if len(found) == 1:
            pairs.append((found.pop(), column))
    times = [of_teacher for of_teacher, _ in pairs]
    pairs = [pair for pair in pairs if times.count(pair[0]) == 1]
    return SharedClasses(tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))


def check_shared(loss: LossConfig, shared: SharedClasses | None, num_classes: int) -> None:
    """Raise UserError for a loss that compares classes which teacher and data have not in common."""
    if shared is None:
        return
    reads = [method for method in loss.rivals if RIVALS[method].logits]
    asked = [*(["KD (loss.kd_weight, loss.name kd, preset best)"] if loss.resolved_kd_weight else []), *reads]
    count = len(shared.of_data)
    if asked and count < 2:
        raise UserError(
            f"the teacher's classes and the data's have {count} in common, and {' and '.join(asked)} compares the "
            "logits of both: leave it out (features need no common classes), or pass --teacher.classes FILE with the "
            "names of the teacher's classes, one a line, as the data names them"
        )
    labelled = [method for method in reads if RIVALS[method].one_class]
    if labelled and count < num_classes:
        raise UserError(
            f"{' and '.join(labelled)} compares the label with the other classes, and {num_classes - count} of the "
            f"data's {num_classes} classes are not among the teacher's: use kd or dist, which read the {count} shared"
        )


def columns(indices: Sequence[int]) -> Tensor:
    """Return column numbers (S,) as a tensor."""
    return torch.tensor(indices, dtype=torch.int64)


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").casefold().split())


def _unique(names: Sequence[set[str]]) -> dict[str, int]:
    """{name: number of the class}, of names that one class alone has."""
    found: dict[str, int] = {}
    twice: set[str] = set()
    for number, several in enumerate(names):
        for name in several:
            twice |= {name} & found.keys()
            found[name] = number
    return {name: number for name, number in found.items() if name not in twice}
