"""Top-1 by several right labels of an image: ImageNet-ReaL (Beyer et al. 2020, "Are we done with ImageNet?")."""

from __future__ import annotations

import json
import re

import torch
from torch import Tensor

from mimkd_ray import storage
from mimkd_ray.data.sources.source import Source
from mimkd_ray.errors import UserError

LEAST_AGREEMENT = 0.5
"""Share of images whose own label must be among the right ones. Of ImageNet it is about 0.9, and 0.002 by chance."""
CHUNK = 64
"""Rows whose bytes are in memory at a time while their file names are read."""


def real_accuracy(predicted_N: Tensor, labels_N: Tensor, ids_N: Tensor, source: Source, file: str) -> dict[str, float]:
    """Return the top-1 (%) of the images that have a label in `file`, any of which is right, and their number (rows).

    The list's place of an image is the number at the end of its file's name, from 1 (ILSVRC2012_val_00000001.JPEG);
    of Parquet it is the row, from 0. Reads the files of `source` once more, for their names. Raises UserError for a
    file that is no such list, and where labels of the data and of the file do not go together.
    """
    right = read_real(file)
    place_of = _places(source)
    hits = agreeing = rows = 0
    for predicted, label, id_ in zip(predicted_N.tolist(), labels_N.tolist(), ids_N.tolist(), strict=True):
        place = place_of[id_]
        if not 0 <= place < len(right):
            raise UserError(f"eval.real {file} has {len(right):,} images, and the data has one of number {place}")
        if right[place]:
            rows += 1
            hits += predicted in right[place]
            agreeing += label in right[place]
    if not rows or agreeing < LEAST_AGREEMENT * rows:
        raise UserError(
            f"eval.real {file}: the data's own label is right for {agreeing:,} of {rows:,} images, and for most it "
            "should be: give the images of the ImageNet validation set in class folders under their own names, with "
            "classes in the order of the WordNet ids"
        )
    return {"top1": 100 * hits / rows, "rows": rows}


def read_real(file: str) -> list[frozenset[int]]:
    """Return the right classes of each image. Raises UserError for a file that is missing or no list of lists."""
    url = storage.absolute(file)
    storage.refuse_pipe(url, "eval.real")
    try:
        value = json.loads(storage.read_bytes(url))
    except FileNotFoundError:
        raise UserError(f"eval.real {file}: there is no such file; give real.json of ImageNet-ReaL") from None
    except OSError as error:
        raise UserError(
            f"eval.real {file} cannot be read ({type(error).__name__}): give real.json of ImageNet-ReaL"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"eval.real {file} is not JSON: {error}") from None
    if not isinstance(value, list) or not all(
        isinstance(each, list) and all(type(number) is int for number in each) for each in value
    ):
        raise UserError(f"eval.real {file}: expected a list with a list of class numbers for each image")
    return [frozenset(each) for each in value]


def _places(source: Source) -> dict[int, int]:
    """Return the place in the list of each row, by its id."""
    found = {}
    for positions in torch.arange(source.num_rows).split(CHUNK):
        for row in source.read(positions.tolist()):
            name = re.search(r"_(\d+)\.\w+$", row.name)
            found[row.id] = int(name[1]) - 1 if name else row.id
    return found
