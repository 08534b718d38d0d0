"""From the loader's batches to what a step eats: lanes on the device, with the teacher's features."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mimkd_ray.config import Config
from mimkd_ray.data.augment.batch_views import BatchTransform
from mimkd_ray.data.augment.mixing import mix
from mimkd_ray.data.loading.loader import DamageCounter, LaneBatch
from mimkd_ray.losses.features import Features, Others
from mimkd_ray.taps.tap_codecs import Coding
from mimkd_ray.train.distributed import gather_lanes
from mimkd_ray.train.from_cache.cached_negatives import CachedNegatives
from mimkd_ray.train.from_cache.live_check import CacheCheck
from mimkd_ray.train.records import start_times
from mimkd_ray.train.step import Normalizer
from mimkd_ray.train.teacher import Teacher


class Lane(NamedTuple):
    """One lane of one step, ready for the student."""

    number: int
    view: int
    images_BCHW: Tensor  # normalised, on the device
    labels_B: Tensor  # class numbers, or (B, classes) probabilities of mixed images
    ids_B: Tensor
    teacher: Features | None


class Feed:
    """Finishes the views of lanes on the device, mixes them, and runs the teacher or decodes its cached features.

    One lane is held at a time, for all students of a pack. With ``negatives=step`` all of this worker's lanes are,
    because their teacher vectors go to the other workers before the first lane is trained on.
    """

    def __init__(
        self,
        config: Config,
        num_classes: int,
        batch_view: BatchTransform | None,
        normalize: Normalizer,
        teacher: Teacher | None,
        damage: DamageCounter,
        cached: Coding | None = None,
        check: CacheCheck | None = None,
        negatives: CachedNegatives | None = None,
        shares_vectors: bool = False,
    ) -> None:
        """``cached``: decodes the features that come with the batches; the teacher is then not asked, but by ``check``
        for a few lanes. ``negatives``: vectors of random images for every lane. ``shares_vectors``: where there are
        any, each lane gets the teacher's vectors of all others."""
        self.config, self.num_classes = config, num_classes
        self.batch_view, self.normalize, self.teacher, self.damage = batch_view, normalize, teacher, damage
        self.cached, self.check, self.negatives = cached, check, negatives
        self.shares_vectors = shares_vectors and teacher is not None and bool(teacher.vectors)
        self.waited = 0.0  # seconds that steps waited for the loader

    def step(self, step: int, lanes: Iterable[int], batches: Iterator[LaneBatch]) -> Iterable[Lane]:
        """This worker's lanes of one step, in their order."""
        loaded = (self._lane(step, lane, batches) for lane in lanes)
        return self._with_others(list(loaded)) if self.shares_vectors else loaded

    def _lane(self, step: int, lane: int, batches: Iterator[LaneBatch]) -> Lane:
        asked = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - asked
        start_times.mark("first_batch")
        assert (batch.step, batch.lane) == (step, lane), f"step {step} lane {lane} got {batch.step} {batch.lane}"
        self.damage.add(batch)
        config = self.config
        images, labels_B, ids_B = batch.images_BCHW, batch.labels_B, batch.ids_B
        if self.batch_view is not None:
            images = self.batch_view(images, ids_B, batch.view, config.view_seed)
        pixels, images = images, self.normalize(images)
        if config.mix.active:
            images, labels_B = mix(images, labels_B, self.num_classes, config.mix, config.train.seed, step, lane)
        features = None
        if self.cached is not None:
            features = self.cached.decode(batch.features)
            if self.check is not None and self.check.due(step, lane):
                self.check.look(batch, pixels, images, features)
            if self.negatives is not None:
                rows, ids_M = self.negatives.draw(step, lane, images.device)
                features = features._replace(others=Others(self.cached.decode(rows).vectors, ids_M))
        elif self.teacher is not None:
            features = self.teacher.features(images)
        return Lane(lane, batch.view, images, labels_B, ids_B, features)

    def _with_others(self, mine: list[Lane]) -> list[Lane]:
        """Give each lane the teacher vectors of all other lanes of the step, in the order of lanes."""
        lanes = self.config.train.lanes
        features = [lane.teacher for lane in mine if lane.teacher is not None]
        vectors_LBC = {
            tap: gather_lanes(torch.stack([f.vectors[tap].float() for f in features]), lanes)
            for tap in features[0].vectors
        }
        ids_LB = gather_lanes(torch.stack([lane.ids_B for lane in mine]), lanes)
        ready = []
        for lane, own in zip(mine, features, strict=True):
            rest = [other for other in range(lanes) if other != lane.number]
            others = Others({tap: v[rest].flatten(0, 1) for tap, v in vectors_LBC.items()}, ids_LB[rest].flatten())
            ready.append(lane._replace(teacher=own._replace(others=others)))
        return ready
