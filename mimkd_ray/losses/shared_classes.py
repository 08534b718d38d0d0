"""The classes that a teacher and the data have in common, where the teacher's head means others than the data's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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


def comparable(loss: LossConfig, shared: SharedClasses | None) -> LossConfig:
    """Return the loss without what compares logits (KD, DKD, DIST), where teacher and data share no classes."""
    if shared is None or shared.of_data:
        return loss
    return replace(
        loss,
        name=tuple(method for method in loss.name if method == "mimkd" or not RIVALS[method].logits),
        preset="accuracy" if loss.preset == "best" else loss.preset,  # which are the same without KD
        kd_weight=0.0,
    )


def check_classes(loss: LossConfig, shared: SharedClasses | None, num_classes: int) -> None:
    """Raise UserError for a loss that compares classes which the data has not, or has not in common with the
    teacher."""
    reads = [method for method in loss.rivals if RIVALS[method].logits]
    for method in reads:
        if num_classes < RIVALS[method].fewest_classes:
            raise UserError(
                f"loss.name has {method}, which compares the label with the other classes, and the data has "
                f"{num_classes} class: choose another loss, or set --data.num-classes"
            )
    if shared is None:
        return
    if loss.uses_teacher and not comparable(loss, shared).uses_teacher:
        asked = [*(["KD (loss.kd_weight, loss.name kd)"] if loss.resolved_kd_weight else []), *reads]
        raise UserError(
            f"the teacher's classes and the data's have none to compare in common, and all that the loss has of the "
            f"teacher, {' and '.join(asked)}, compares the logits of both: choose one that reads features (--loss.name "
            "mimkd), or pass --teacher.classes FILE with the names of the teacher's classes, one a line, as the data "
            "names them"
        )
    labelled = [method for method in comparable(loss, shared).rivals if method in reads and RIVALS[method].one_class]
    if labelled and len(shared.of_data) < num_classes:
        raise UserError(
            f"{' and '.join(labelled)} compares the label with the other classes, and "
            f"{num_classes - len(shared.of_data)} of the data's {num_classes} classes are not among the teacher's: use "
            f"kd or dist, which read the {len(shared.of_data)} shared"
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
