"""Small images of held-out rows, for a page: those that a student is most certain about, and wrong."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mimkd_ray import storage
from mimkd_ray.data.augment.decode import DamagedImageError, decode
from mimkd_ray.data.sources.source import Row, ids_of
from mimkd_ray.errors import DamagedDataError, UserError
from mimkd_ray.evaluation.measure import open_evaluated
from mimkd_ray.pages.page import Thumbnail
from mimkd_ray.pages.run_records import RunRecord

MOST_IMAGES = 24
SIDE = 128
"""Pixels of the longer side; smaller images stay as they are."""
LOSSLESS = 64
"""Images up to this side are kept exactly: JPEG would spoil them."""


def worst_images(run: RunRecord, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Thumbnail], str]:
    """Return the worst images of `rows` (of predictions.parquet), and "" or a sentence that says why there are none."""
    judged = [row for row in rows if row["label"] is not None and row["prediction"] is not None]
    wrong = sorted((row for row in judged if row["prediction"] != row["label"]), key=lambda row: -row["probability"])
    wrong = wrong[:MOST_IMAGES]
    if not wrong:
        return [], "The student is right about all of them." if judged else "No image has a label and a prediction."
    try:
        config = run.parsed().data
        root = run.evaluation.get("data", config.root)
        subset = config.subset if root == config.root else 0
        data = open_evaluated(replace(config, root=root, subset=subset), config)
        source = data.val
        ids = ids_of(source)
        places = np.searchsorted(ids, [row["id"] for row in wrong]).clip(max=len(ids) - 1)
        stored = source.read(places.tolist())
    except (UserError, DamagedDataError, storage.StorageError, OSError) as error:
        return [], f"The images cannot be read here: {error}"
    images = []
    for row, image in zip(wrong, stored, strict=True):
        if image.label < 0 or (image.id, data.names[image.label]) != (row["id"], row["label"]):
            return [], "The images are not shown: the evaluation was of other data than can be read here."
        try:
            file, kind = _encoded(image)
        except DamagedImageError:
            continue
        lines = [("is", row["label"]), ("student", f"{row['prediction']} {row['probability']:.0%}")]
        if row.get("teacher_prediction") is not None:
            lines.append(("teacher", f"{row['teacher_prediction']} {row['teacher_probability']:.0%}"))
        images.append(Thumbnail(file, kind, [*lines, ("id", str(row["id"]))]))
    return images, ""


def _encoded(row: Row) -> tuple[bytes, str]:
    """Return a small copy of a row's image as a file, and its kind."""
    from PIL import Image

    image = Image.fromarray(decode(row.image, how=row.how).permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((SIDE, SIDE))
    kind = "png" if max(image.size) <= LOSSLESS else "jpeg"
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 85} if kind == "jpeg" else {}))
    return file.getvalue(), kind
