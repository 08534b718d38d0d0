"""Repeated computation of a small share of cached rows: features computed live, and the pixels that they came from.

A sha256 proves that the bytes are those that were written. A canary tests that they are still right: that this machine
decodes and augments to the same pixels, and that this teacher gives the same features, within the codec's own error.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from mimkd_ray.data.order.random_numbers import raw
from mimkd_ray.errors import DamagedDataError
from mimkd_ray.teacher_cache.feature_manifest import Error
from mimkd_ray.teacher_cache.pixel_digests import ALLOWED_LEVELS, compare

logger = logging.getLogger(__name__)

WORST_FACTOR = 10
"""Factor on the tolerance for the error of a single row."""


class Drift(NamedTuple):
    """Distance of cached features from live ones, relative to the size of the live ones: all rows together, and the
    worst row."""

    relative: float
    worst: float
    row: int


def chosen(seed: int, epoch: int, batches: int, share: float) -> set[int]:
    """Return the lane batches of an epoch that are compared: a keyed share of them, at least one; none for share 0."""
    if share == 0:
        return set()
    count = max(1, round(share * batches))
    return set(np.argsort(raw(batches, seed, "canary", epoch), kind="stable")[:count].tolist())


def drift(cached: Tensor, live: Tensor) -> Drift:
    """Compare decoded features with live ones, (B, ...)."""
    lost_B = (cached.double() - live.double()).flatten(1).square().sum(1)
    norm_B = live.double().flatten(1).square().sum(1)
    size = float(norm_B.mean()) or 1.0
    worst = int(lost_B.argmax())
    return Drift(float(lost_B.mean() / size) ** 0.5, float(lost_B[worst] / size) ** 0.5, worst)


def check_features(
    cached: Mapping[str, Tensor],
    live: Mapping[str, Tensor],
    known: Mapping[str, Error],
    ids_B: Tensor,
    tolerance: float,
    where: str,
) -> dict[str, float]:
    """Raise DamagedDataError if features differ from live ones by more than the `known` errors and `tolerance` allow.

    Features are by label. Returns the relative error by label.
    """
    found = {}
    for label, features in cached.items():
        seen, expected = drift(features, live[label]), known[label]
        limit, worst_limit = 2 * expected.relative + tolerance, 2 * expected.worst + WORST_FACTOR * tolerance
        found[label] = seen.relative
        if not (seen.relative <= limit and seen.worst <= worst_limit):
            raise DamagedDataError(
                f"{where}: cached features of {label} differ from those that the teacher gives now by "
                f"{seen.relative:.3g} (its codec loses {expected.relative:.3g}, {limit:.3g} is allowed), those of "
                f"image {int(ids_B[seen.row])} by {seen.worst:.3g} ({worst_limit:.3g} is allowed): a library, the "
                "decoder or the arithmetic has changed since the cache was built; build it again under another "
                "--cache.root, or allow more with --cache.tolerance"
            )
    return found


class PixelWatch:
    """Comparison of pixels with the cached ones: one warning for small differences, an error for large ones."""

    def __init__(self) -> None:
        self.warned = False

    def check(self, cached: np.ndarray, live: np.ndarray, ids: np.ndarray, where: str) -> int:
        """Return the number of rows with any difference. Raises DamagedDataError if a view looks different."""
        seen = compare(cached, live)
        if seen.levels > ALLOWED_LEVELS:
            raise DamagedDataError(
                f"{where}: image {int(ids[seen.worst])} has other pixels than when the cache was built: cells of it "
                f"differ by {seen.levels} grey levels, {ALLOWED_LEVELS} are allowed: the data, the decoder or the view "
                "pipeline has changed; build the cache again under another --cache.root"
            )
        if seen.differing and not self.warned:
            self.warned = True
            logger.warning(
                "%s: the pixels of %d of %d images differ from those that were cached, by %d grey levels of a cell at "
                "most, as they do between CPUs and builds of a decoder (said once)",
                where,
                seen.differing,
                len(ids),
                seen.levels,
            )
        return seen.differing
