"""From the loader's batches to what a step eats: lanes on the device, with the teacher's features."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mimkd_ray.config import Config
from mimkd_ray.data.augment.batch_views import BatchTransform, view_key
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
        return self.with_others(self._lane(step, self.next(step, lane, batches)) for lane in lanes)

    def next(self, step: int, lane: int, batches: Iterator[LaneBatch]) -> LaneBatch:
        """Return the next batch, which is that of a step's lane. Damaged images in it are counted."""
        asked = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - asked
        start_times.mark("first_batch")
        assert (batch.step, batch.lane) == (step, lane), f"step {step} lane {lane} got {batch.step} {batch.lane}"
        self.damage.add(batch)
        return batch

    def _lane(self, step: int, batch: LaneBatch) -> Lane:
        pixels, ready = self.finish(batch, view_key(batch.view, self.config.view_seed))
        mixing, lane = self.config.mix, batch.lane
        if mixing.active:
            seed = self.config.train.seed
            images, labels_B = mix(ready.images_BCHW, ready.labels_B, self.num_classes, mixing, seed, step, lane)
            ready = ready._replace(images_BCHW=images, labels_B=labels_B)
        ready = self.with_teacher(ready, batch.features)
        if self.check is not None and self.check.due(step, lane):
            assert ready.teacher is not None
            self.check.look(batch, pixels, ready.images_BCHW, ready.teacher)
        if self.negatives is not None:
            assert self.cached is not None
            assert ready.teacher is not None
            rows, ids_M = self.negatives.draw(step, lane, ready.images_BCHW.device)
            others = Others(self.cached.decode(rows).vectors, ids_M)
            ready = ready._replace(teacher=ready.teacher._replace(others=others))
        return ready

    def finish(self, batch: LaneBatch, key: int | Tensor) -> tuple[Tensor, Lane]:
        """Return a batch's images in their view, uint8, and the lane with them normalised. ``key``: the view's."""
        images = batch.images_BCHW
        if self.batch_view is not None:
            images = self.batch_view(images, batch.ids_B, key)
        return images, Lane(batch.lane, batch.view, self.normalize(images), batch.labels_B, batch.ids_B, None)

    def with_teacher(self, lane: Lane, cached: Mapping[str, Tensor]) -> Lane:
        """Give a lane what its cached features say, or, without a cache, what the teacher says of its images."""
        if self.cached is not None:
            return lane._replace(teacher=self.cached.decode(cached))
        if self.teacher is not None:
            return lane._replace(teacher=self.teacher.features(lane.images_BCHW))
        return lane

    def with_others(self, lanes: Iterable[Lane]) -> Iterable[Lane]:
        """Give each lane the teacher vectors of all other lanes of the step, where any loss asks for them."""
        return self._with_others(list(lanes)) if self.shares_vectors else lanes

    def _with_others(self, mine: list[Lane]) -> list[Lane]:
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
