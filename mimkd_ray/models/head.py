"""The classifier of a network: its last layer."""

from __future__ import annotations

from torch import nn

from mimkd_ray.errors import UserError


def head_of(model: nn.Module, num_classes: int) -> str:
    """Return the module path of the classifier: the last linear layer or convolution of ``num_classes`` outputs.

    Raises UserError if there is none.
    """
    found = [
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.shape[0] == num_classes
    ]
    if not found:
        raise UserError(
            f"{type(model).__name__} has no last layer of {num_classes} outputs, and its head is to be trained first: "
            "pass --teacher.head-epochs 0 for a teacher, or --student.head-epochs 0 for a student"
        )
    return found[-1]
