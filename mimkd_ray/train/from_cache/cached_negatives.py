"""Negatives from the cache: teacher vectors of random images of the training set, without a word between workers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mimkd_ray.config import Config
from mimkd_ray.data.order.random_numbers import raw
from mimkd_ray.data.sources.source import Source, ids_of
from mimkd_ray.errors import UserError
from mimkd_ray.losses.teacher_queue import NO_LABEL
from mimkd_ray.teacher_cache.feature_reader import FeatureReader
from mimkd_ray.teacher_cache.mapped_vectors import COLUMN_VIEW, open_column


class CachedNegatives:
    """Draws for each lane of each step. What is drawn depends on (seed, step, lane) only, never on who carries it."""

    def __init__(self, config: Config, reader: FeatureReader, labelled: Source | None = None) -> None:
        """Collects the vectors that the loss reads on this node, where no process has yet. ``labelled``: the training
        set, if the loss asks for the classes of its images."""
        labels = [label for label in reader.used if label.endswith(":vector")]
        if not labels:
            raise UserError(
                "loss.negatives is cache, and no term reads a teacher's vector: turn a global or local term on, or "
                "pass --loss.negatives all"
            )
        self.columns = {
            label: open_column(reader.root, reader.manifest(label, COLUMN_VIEW), config.data.store) for label in labels
        }
        self.seed, self.count = config.train.seed, config.cache.negatives
        self.rows, self.kept = reader.rows, reader.kept
        self.damaged = reader.manifest(labels[0], COLUMN_VIEW).damaged
        self.labels = None if labelled is None else (ids_of(labelled), labelled.labels())

    def draw(self, step: int, lane: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return {label: rows (M, row_bytes)} as they are stored, ids_M and class numbers labels_M (NO_LABEL where they
        are not known), on the device. Images that could not be decoded are left out."""
        among = np.uint64(self.rows if self.kept is None else len(self.kept))
        positions = np.sort(raw(self.count, self.seed, "negatives", step, lane) % among).astype(np.int64)
        if self.kept is not None:  # images that are held out give no negatives
            positions = self.kept[positions]
        ids = next(iter(self.columns.values())).ids_N[positions]
        if len(self.damaged):
            sound = ~np.isin(ids, self.damaged)
            positions, ids = positions[sound], ids[sound]
        rows = {label: column.rows_NB[positions] for label, column in self.columns.items()}
        classes = np.full_like(ids, NO_LABEL)
        if self.labels is not None:
            of_train, of_class = self.labels
            places = np.searchsorted(of_train, ids).clip(max=len(of_train) - 1)
            classes = np.where(of_train[places] == ids, of_class[places], NO_LABEL)

        def bring(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        return {label: bring(array) for label, array in rows.items()}, bring(ids), bring(classes)
