"""WebDataset tars (data/sources/tars.py) as a source of data preparation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mimkd_ray import storage
from mimkd_ray.data.prepare.archives import TarSlice
from mimkd_ray.data.prepare.input_pieces import Origin, rows_per_piece
from mimkd_ray.data.sources.source import digest_of, numbered_classes
from mimkd_ray.data.sources.tar_headers import headers


def open_tars(tars: Mapping[str, storage.Entry]) -> Origin:
    """Read the headers of the tars. Raises UserError for what is no tar, and images without a label."""
    found = headers(tars)
    step = rows_per_piece(sum(map(len, found)))
    pieces = []
    for url, images in zip(tars, found, strict=True):
        for start in range(0, len(images), step):
            part = images[start : start + step]
            members = tuple((image.name, image.offset, image.bytes) for image in part)
            pieces.append(TarSlice(url, members, tuple(image.label for image in part)))
    labels = tuple(np.array(piece.labels, np.int64) for piece in pieces)
    classes = numbered_classes(max(int(each.max()) for each in labels), next(iter(tars)))
    digest = digest_of("web tars", [(url.rpartition("/")[2], entry.size) for url, entry in tars.items()], found)
    return Origin(classes, digest, tuple(pieces), labels)
