"""Fits the codecs of a run on a sample of its training set, once for all runs and builders that share the place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mimkd_ray.config import Config
from mimkd_ray.data.augment.batch_views import view_key
from mimkd_ray.data.augment.pipelines import Pipeline
from mimkd_ray.data.loading.batches import DAMAGED, Key, LaneBatch
from mimkd_ray.data.loading.loader import to_device, view_batches
from mimkd_ray.data.order.random_numbers import Permutation
from mimkd_ray.data.sources.data_set import Data
from mimkd_ray.errors import UserError
from mimkd_ray.losses.features import Features
from mimkd_ray.taps.tap_codecs import by_label
from mimkd_ray.teacher_cache import calibration
from mimkd_ray.teacher_cache.calibration import Fitter
from mimkd_ray.teacher_cache.keys import Entry
from mimkd_ray.train.networks.device_settings import parameter_dtype, uses_channels_last
from mimkd_ray.train.networks.student_module import Normalizer
from mimkd_ray.train.networks.teacher import Teacher


class Sight:
    """Pixels and teacher features of rows in a view, outside of training: for calibrations and for building caches."""

    def __init__(self, config: Config, data: Data, pipeline: Pipeline, teacher: Teacher, device: torch.device) -> None:
        self.config, self.source, self.pipeline, self.teacher = config, data.whole, pipeline, teacher
        self.device = device
        self.normalize = Normalizer(
            config.data.mean,
            config.data.std,
            device,
            parameter_dtype(config.train),
            uses_channels_last(config.train, device),
        )

    def batches(self, keys: Sequence[Key]) -> Iterator[LaneBatch]:
        """The batches of ``keys`` on the device, decoded ahead by loader processes."""
        pin = self.device.type == "cuda"
        found = view_batches(self.source, self.config.data, keys, self.config.view_seed, pin_memory=pin)
        return to_device(found, self.device)

    def look(self, batch: LaneBatch) -> tuple[Tensor, Features]:
        """The finished uint8 pixels of a batch, and the teacher's features."""
        images = batch.images_BCHW
        if self.pipeline.batch is not None:
            images = self.pipeline.batch(images, batch.ids_B, view_key(batch.view, self.config.view_seed))
        return images, self.teacher.features(self.normalize(images))


def sample_keys(rows: int, count: int, seed: int, batch: int) -> list[Key]:
    """Batches of `count` random rows of `rows`, in the order of positions, in their first view; where there are fewer
    rows, all of them in as many views as it takes. It does not depend on how many views are cached."""
    keys: list[Key] = []
    for view, start in enumerate(range(0, count, rows)):
        chosen = np.sort(Permutation(rows, seed, "calibration", view).at(np.arange(min(rows, count - start))))
        keys += [Key(0, 0, part, view) for part in np.split(chosen, range(batch, len(chosen), batch))]
    return keys


def fit(sight: Sight, entries: Sequence[Entry], seen: Callable[[int], None]) -> dict[str, bytes]:
    """Return the calibrations of entries by label, as files. ``sight`` has a teacher without codecs; ``seen`` is told
    how many images it has looked at.

    Damaged images are left out. Runs the teacher on ``cache.calibration_rows`` images (or views of images). Raises
    UserError for features that are not finite.
    """
    cache = sight.config.cache
    keys = sample_keys(sight.source.num_rows, cache.calibration_rows, sight.config.view_seed, cache.batch)
    fitters = {entry.label: Fitter(entry.spec, entry.shape, cache.calibration_rows, sight.device) for entry in entries}
    images = 0
    for batch in sight.batches(keys):
        features = by_label(sight.look(batch)[1])
        intact = batch.labels_B != DAMAGED
        for label, fitter in fitters.items():
            fitter.add(features[label][intact])
        images += len(batch.labels_B)
        seen(images)
    for label, fitter in fitters.items():
        if not fitter.finite:
            raise UserError(
                f"{label}: the teacher's features of the {fitter.images:,} images on which its codec is fitted are not "
                "all finite: check the teacher's weights and --cache.precision"
            )
    return {label: calibration.to_bytes(fitter.finish()) for label, fitter in fitters.items()}
