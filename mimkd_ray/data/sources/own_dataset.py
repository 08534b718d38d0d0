"""Data sets that are objects of the program instead of files: any map-style torch.utils.data.Dataset of (image, label).

    mimkd_ray.run(config, train=MyDataset("train"), validation=MyDataset("val"))
    --data.root my_package.sets:load    # a function that returns both; for workers of a cluster too

An image is a Pillow image; a uint8 tensor (C, H, W) or (H, W), or array (H, W, C) or (H, W), of one or three channels;
or a floating tensor (C, H, W) of values in 0..1, which is rounded to 256 levels. A label is a class number.
Augmentation and normalisation belong to the config (`data.pipeline`, `data.mean`, `data.std`). A data set that augments
makes views depend on more than seed, image and view number, so that a resumed run differs.

Rows keep their numbers as ids. Labels are read once, at the start: from the attribute `targets`, as in torchvision's
data sets (or that of the set below a torch.utils.data.Subset), or else from every row. Images are read in loader
processes, which are forked on Linux and pickled elsewhere. An error of the data set ends the run.

The digest, by which a resumed run recognises its data, covers the number of rows, the classes and all labels. It does
not cover images: other images with the same labels are not noticed.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from mimkd_ray.data.augment.decode import DamagedImageError, rgb_pixels
from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.data.sources.source import Row, Source, digest_of, numbered_classes
from mimkd_ray.errors import UserError, listed
from mimkd_ray.user_functions import call_named, named_function

SCHEME = "own://"
"""Prefix of `data.root` for data sets passed as objects; their digest follows it."""
BLOCK_ROWS = 256
VALIDATION = ("validation", "val", "valid", "test")


class OwnSource(Source):
    """The rows of a map-style data set; id = position."""

    def __init__(self, dataset: Dataset, role: str, classes: tuple[str, ...] | None = None) -> None:
        """Open a data set. ``role`` is its name in errors; ``classes`` are those of the training set. Raises UserError
        unless it is a map-style data set of (image, label), and for class names that differ from ``classes``."""
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise UserError(
                f"the {role} set is a {type(dataset).__name__}, which cannot be asked for its length and its rows by "
                "number: give a map-style torch.utils.data.Dataset, with __len__ and __getitem__"
            )
        self.dataset, self.role = dataset, role
        self.num_rows = len(dataset)
        if not self.num_rows:
            raise UserError(f"the {role} set has no rows")
        self._labels = _labels(dataset, role)
        named = _class_names(dataset)
        if classes and named and named != classes:
            raise UserError(
                f"the {role} set names the classes {listed(named)} and the training set {listed(classes)}: the labels "
                "of both must mean the same"
            )
        self.classes = classes or named or numbered_classes(int(self._labels.max()), f"the {role} set")
        self.blocks = Blocks.uniform(self.num_rows, BLOCK_ROWS)
        of_labels = hashlib.sha256(self._labels.tobytes()).hexdigest()
        self.digest = digest_of("own", role, self.num_rows, self.classes, of_labels)

    def read(self, positions: Sequence[int]) -> list[Row]:
        """Return the rows at `positions`, in that order; images are (H, W, 3) uint8 arrays."""
        return [self._row(int(position)) for position in positions]

    def _row(self, position: int) -> Row:
        name = f"row {position} of the {self.role} set"
        try:
            image, label = _item(self.dataset, position, name)
            row = Row(position, label, pixels_of(image, name), name)
        except UserError:
            raise
        except DamagedImageError as error:
            raise UserError(f"{name} {error}") from error
        except Exception as error:  # foreign code: its error has the cause, and the note the row
            error.add_note(name)
            raise
        if label != self._labels[position]:
            raise UserError(
                f"{name} has the label {label}, and had {self._labels[position]} when labels were asked for (its "
                "attribute `targets`, or the row itself): make the two agree, or leave `targets` out"
            )
        return row


class OwnData:
    """The training and the validation set of a run, opened once."""

    def __init__(self, train: Dataset, validation: Dataset | None) -> None:
        self.train = OwnSource(train, "training")
        self.validation = None if validation is None else OwnSource(validation, "validation", self.train.classes)
        self.root = SCHEME + digest_of(self.train.digest, self.validation.digest if self.validation else "")

    @classmethod
    def of(cls, train: Dataset | None, validation: Dataset | None) -> OwnData | None:
        """Open the data sets; None if none was given."""
        if train is None:
            if validation is not None:
                raise UserError("a validation set was given and no training set: give both, or only train=")
            return None
        return cls(train, validation)

    def open(self, split: str, classes: tuple[str, ...] | None) -> Source | None:
        """Return the split, or None if it was not given. ``classes`` is ignored: they are always the training set's."""
        return self.train if split == "train" else self.validation if split in VALIDATION else None

    def found(self) -> str:
        """Return the names of the given sets, for errors."""
        return "train" if self.validation is None else "train, validation"


@functools.lru_cache(maxsize=1)
def named_sets(name: str) -> OwnData:
    """Return the data sets of `package.module:function`, which takes nothing and returns the training set, or a pair of
    the training and the validation set. Every process calls it once. Raises UserError."""
    made = call_named("data.root", name, named_function("data.root", name))
    train, validation = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    return OwnData(train, validation)


def pixels_of(image: Any, name: str) -> np.ndarray:
    """Convert an image of a data set to (H, W, 3) uint8. Raises UserError for other kinds, shapes and values."""
    if isinstance(image, Tensor) and image.dim() == 3 and image.is_floating_point():
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):
            raise UserError(
                f"{name} is an image of floating values from {low:.3g} to {high:.3g}: give values in 0..1, and leave "
                "normalisation to data.mean and data.std"
            )
        image = (image * 255).round().to(torch.uint8)
    if isinstance(image, Tensor):
        image = image.permute(1, 2, 0).numpy() if image.dim() == 3 else image.numpy()
    elif hasattr(image, "mode") and hasattr(image, "convert"):
        image = rgb_pixels(image)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(f"{name} has an image of {kind}: give a Pillow image, a uint8 tensor, or floats in 0..1")
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3):
        raise UserError(
            f"{name} has an image of the shape {image.shape} as (height, width, channels): give one or three channels, "
            "tensors as (channels, height, width)"
        )
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def _item(dataset: Dataset, position: int, name: str) -> tuple[Any, int]:
    item = dataset[position]
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise UserError(f"{name} is a {type(item).__name__}: give (image, label)")
    return item[0], _class_number(item[1], name)


def _class_number(label: Any, name: str) -> int:
    number = label
    if isinstance(label, (Tensor, np.ndarray, np.generic)) and math.prod(label.shape) == 1:
        number = label.item()
    if isinstance(number, bool) or not isinstance(number, int):
        raise UserError(f"{name} has the label {label!r}: give a class number, an int")
    return number


def _labels(dataset: Dataset, role: str) -> np.ndarray:
    known = _targets(dataset)
    if known is not None:
        return known
    rows = range(len(dataset))  # type: ignore[arg-type]
    return np.array([_item(dataset, row, f"row {row} of the {role} set")[1] for row in rows], dtype=np.int64)


def _targets(dataset: Any) -> np.ndarray | None:
    """Return the labels that a data set has beside its images; None if it has none or transforms them."""
    if isinstance(dataset, Subset):
        whole = _targets(dataset.dataset)
        return None if whole is None else whole[np.asarray(dataset.indices, dtype=np.int64)]
    targets = getattr(dataset, "targets", None)
    if targets is None or getattr(dataset, "target_transform", None) is not None:
        return None
    found = np.asarray(targets)
    return found.astype(np.int64) if found.shape == (len(dataset),) and found.dtype.kind in "iu" else None


def _class_names(dataset: Any) -> tuple[str, ...]:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", ())
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) else ()
