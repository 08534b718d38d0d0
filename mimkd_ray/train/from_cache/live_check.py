"""The canary of a cached run: some lanes of each epoch are looked at again, with the teacher at work."""

from __future__ import annotations

from torch import Tensor

from mimkd_ray.config import Config
from mimkd_ray.data.loading.batches import LaneBatch
from mimkd_ray.data.order.sample_order import Order
from mimkd_ray.losses.features import Features
from mimkd_ray.taps.tap_codecs import by_label
from mimkd_ray.teacher_cache.canary import PixelWatch, check_features, chosen
from mimkd_ray.teacher_cache.feature_reader import FeatureReader
from mimkd_ray.teacher_cache.pixel_digests import PIXELS, pixel_rows
from mimkd_ray.train.networks.teacher import Teacher


class CacheCheck:
    """Compares the features and pixels of the first lane that this worker meets, and of a share of the others."""

    def __init__(self, config: Config, reader: FeatureReader, order: Order, teacher: Teacher) -> None:
        self.config, self.reader, self.order, self.teacher = config, reader, order, teacher
        self.pixels = PixelWatch()
        self.looked = 0
        """Lanes so far."""
        self.relative: dict[str, float] = {}
        """Relative error of the last one, by label."""
        self._epoch, self._chosen = -1, set[int]()

    def due(self, step: int, lane: int) -> bool:
        """Return whether a lane is to be checked: the same ones whoever carries it, and each worker's first."""
        epoch, place = divmod(step, self.order.steps_per_epoch)
        if epoch != self._epoch:
            batches = self.order.steps_per_epoch * self.order.lanes
            self._epoch = epoch
            self._chosen = chosen(self.config.train.seed, epoch, batches, self.config.cache.canary)
        return self.looked == 0 or place * self.order.lanes + lane in self._chosen

    def look(self, batch: LaneBatch, pixels_BCHW: Tensor, images_BCHW: Tensor, features: Features) -> None:
        """Compare a lane's decoded features and finished uint8 pixels. Raises DamagedDataError for drift.

        Costs a forward pass of the teacher, and a millisecond for each few images' digests.
        """
        self.looked += 1
        where = f"step {batch.step}, lane {batch.lane}, view {batch.view}"
        if not batch.damaged:  # those have no pixels, and their places hold other images
            ids = batch.ids_B.cpu().numpy()
            positions = self.order.positions(batch.step, batch.lane)
            cached = self.reader.read(batch.view, positions, ids, [PIXELS])[PIXELS]
            self.pixels.check(cached, pixel_rows(pixels_BCHW), ids, where)
        live = by_label(self.teacher.features(images_BCHW))
        named = {label: value for label, value in by_label(features).items() if label in self.reader.used}
        known = {label: self.reader.manifest(label, batch.view).error for label in named}
        self.relative = check_features(named, live, known, batch.ids_B, self.config.cache.tolerance, where)
