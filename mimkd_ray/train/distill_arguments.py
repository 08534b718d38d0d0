"""Checks of what `mimkd_ray.distill` is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from mimkd_ray import console
from mimkd_ray.config import LossConfig
from mimkd_ray.errors import UserError, nearest
from mimkd_ray.losses.methods.registry import RIVALS
from mimkd_ray.losses.shared_classes import SharedClasses, comparable

PAIR_KINDS = ("global", "local", "feature", "rival")

Labels = Literal["all", "partial", "none"]


def check_kinds(teacher: Any, student: Any, image_size: Any, loss: Any, labels: str) -> None:
    """Raise UserError for what type checkers would find."""
    for name, network in (("teacher", teacher), ("student", student)):
        if not isinstance(network, nn.Module):
            raise UserError(
                f"{name} is {network!r:.80}: pass a torch.nn.Module (mimkd_ray.build_model makes one by name)"
            )
    if not isinstance(image_size, int) or image_size < 1:
        raise UserError(f"image_size is {image_size!r}: give one number, the height and width of the images in pixels")
    if loss is not None and not isinstance(loss, LossConfig):
        raise UserError(f"loss is {loss!r:.80}: pass a mimkd_ray.LossConfig, such as LossConfig(preset='best')")
    if labels not in get_args(Labels):
        raise UserError(f"labels is {labels!r}: give one of {', '.join(get_args(Labels))}")


def with_pairs(loss: LossConfig, pairs: Mapping[str, Sequence[str]]) -> LossConfig:
    """Return the loss with the layers of `pairs` in the place of its own. Raises UserError for no kind of term."""
    for kind, named in pairs.items():
        if kind not in PAIR_KINDS:
            raise UserError(
                f"pairs has the kind {kind!r}{nearest(kind, PAIR_KINDS)}; there are {', '.join(PAIR_KINDS)}"
            )
        if isinstance(named, str):
            raise UserError(f"pairs[{kind!r}] is {named!r}: give a list of pairs, [{named!r}]")
    named_pairs: dict[str, Any] = {f"{kind}_pairs": tuple(named) for kind, named in pairs.items()}
    return replace(loss, **named_pairs)


def check_combination(
    teacher: nn.Module,
    student: nn.Module,
    loss: LossConfig,
    steps: int | None,
    epoch_steps: int | None,
    labels: Labels,
) -> None:
    """Raise UserError for networks that cannot be distilled, and for what a loss needs beside batches."""
    if teacher is student:
        raise UserError("teacher and student are one object, and the teacher is frozen: pass copy.deepcopy(student)")
    if isinstance(student, (DistributedDataParallel, DataParallel)):
        raise UserError(
            f"the student is wrapped in {type(student).__name__}: pass the plain network, and wrap what distill() "
            "returns, whose critics are trained too"
        )
    for name, network in (("teacher", teacher), ("student", student)):
        if "_orig_mod" in dict(network.named_children()):  # once it has run, the layers in it cannot be read
            raise UserError(
                f"the {name} is compiled already: pass the plain network, and compile what distill() returns"
            )
    for name, count in (("steps", steps), ("epoch_steps", epoch_steps)):
        if count is not None and count < 1:
            raise UserError(f"{name} is {count}: give the number of optimiser steps, 1 or more")
    if loss.schedule != "constant" and steps is None:
        raise UserError(f"loss.schedule is {loss.schedule}: pass steps=, the optimiser steps of the whole training")
    warming = [rival for rival in loss.rivals if RIVALS[rival].warms_up]
    if warming and loss.rival_warmup and epoch_steps is None:
        raise UserError(
            f"{' and '.join(warming)} rises over {loss.rival_warmup:g} epochs (loss.rival_warmup): pass epoch_steps=, "
            "the optimiser steps of an epoch, or LossConfig(rival_warmup=0)"
        )
    banks = [rival for rival in loss.rivals if RIVALS[rival].bank]
    if banks:
        raise UserError(
            f"{' and '.join(banks)} keeps a memory bank of the whole training set: train it with mimkd_ray.run(config)"
        )
    if loss.uses_features and loss.resolved_negatives == "cache":
        raise UserError("loss.negatives is cache, which a loop of batches has none of: choose queue, all or step")
    reads = [rival for rival in loss.rivals if RIVALS[rival].one_class]
    if reads and labels != "all":
        raise UserError(
            f"loss.name has {' and '.join(reads)}, which reads the label of every image, and labels is {labels!r}: "
            "choose another loss"
        )
    if labels == "none" and not loss.uses_teacher:
        raise UserError(
            "labels is 'none', and the loss has nothing but labels to learn from: choose one that has a teacher, such "
            "as LossConfig()"
        )


def without_other_classes(loss: LossConfig, of_teacher: int, of_student: int) -> LossConfig:
    """Return the loss without what compares logits, where teacher and student have other numbers of classes. Raises
    UserError for a loss that compares nothing then."""
    reads = [rival for rival in loss.rivals if of_student < RIVALS[rival].fewest_classes]
    if reads:
        raise UserError(
            f"loss.name has {reads[0]}, which compares the label with the other classes, and the student has "
            f"{of_student} class: choose another loss"
        )
    if of_teacher == of_student:
        return loss
    left = comparable(loss, SharedClasses())
    if loss.uses_teacher and not left.uses_teacher:
        raise UserError(
            f"the teacher has {of_teacher} classes and the student {of_student}, and all that the loss has of the "
            "teacher compares the logits of both: choose one that reads features, such as LossConfig(), or a teacher "
            "of the student's classes"
        )
    if (left.resolved_kd_weight, left.rivals) != (loss.resolved_kd_weight, loss.rivals):
        console.say_once(
            f"teacher has {of_teacher} classes and the student {of_student}: what compares logits (KD, DKD, DIST) is "
            "off"
        )
    return left
