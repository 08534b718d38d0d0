"""How many images of a set may be damaged, and their count."""

from __future__ import annotations

import logging

from mimkd_ray.data.loading.batches import LaneBatch, first_three
from mimkd_ray.errors import DamagedDataError

logger = logging.getLogger(__name__)

A_HANDFUL = 5


def damaged_allowed(max_share: float, rows: int) -> float:
    """Return how many of `rows` images may be damaged: `max_share` of them, and A_HANDFUL in a small set.

    The handful is half of the rows at most; a share of 0 allows none.
    """
    return max(max_share * rows, min(A_HANDFUL, rows // 2)) if max_share > 0 else 0


class DamageCounter:
    """Counts damaged images against what is allowed of the `rows` this worker reads in an epoch.

    Each damaged image is logged once. The count begins anew after `rows` rows, about an epoch: over many
    epochs one worker comes across the damaged images of all, which must not be held against its own share.
    """

    def __init__(self, max_share: float, rows: int) -> None:
        self.max_share = max_share
        self.rows = rows
        self._logged: set[str] = set()
        self._counted: dict[str, None] = {}  # in the order met
        self._seen = 0

    @property
    def damaged(self) -> int:
        """Distinct damaged images met so far."""
        return len(self._logged)

    def add(self, batch: LaneBatch) -> None:
        """Count the batch's damaged images. Raises DamagedDataError when there are too many."""
        if self._seen >= self.rows:
            self._seen = 0
            self._counted.clear()
        self._seen += len(batch)
        for name in batch.damaged:
            if name not in self._logged:
                self._logged.add(name)
                logger.warning("damaged image, left out: %s", name)
            self._counted[name] = None
        if len(self._counted) > damaged_allowed(self.max_share, self.rows):
            raise DamagedDataError(
                f"{len(self._counted):,} of {self.rows:,} images cannot be decoded, more than the allowed "
                f"share of {self.max_share:g}: {first_three(list(self._counted))}; repair the data, or "
                "allow more with --data.max-damaged"
            )
