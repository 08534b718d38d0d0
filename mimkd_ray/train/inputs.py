"""What the students of a process have in common: the order and the batches, the teacher, and the feed of lanes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from mimkd_ray.config import Config
from mimkd_ray.data.augment.views import View, make_pipeline
from mimkd_ray.data.loading.loader import DamageCounter, LaneBatch, eval_batches, to_device, train_batches
from mimkd_ray.data.loading.resident import keeps_on_device, resident, resident_batches
from mimkd_ray.data.sources.data_set import Data
from mimkd_ray.errors import UserError
from mimkd_ray.train.build import build_teacher, choose_kernels, make_order, parameter_dtype, uses_channels_last
from mimkd_ray.train.distributed import Context
from mimkd_ray.train.from_cache.cached_negatives import CachedNegatives
from mimkd_ray.train.from_cache.cached_teacher import Cached
from mimkd_ray.train.from_cache.live_check import CacheCheck
from mimkd_ray.train.input_lanes import Feed
from mimkd_ray.train.records.metrics import say
from mimkd_ray.train.step import Normalizer


class Supply:
    """Feeds one student, or all students of a pack: their configs agree in data, mixing, cache, teacher and lanes."""

    def __init__(
        self,
        configs: Sequence[Config],
        data: Data,
        teacher: nn.Module | None,
        context: Context,
        cached: Cached | None = None,
    ) -> None:
        """``teacher`` is tapped where any of ``configs`` reads it. ``cached``: codecs and, where the run reads a cache,
        its features (train/cached.py)."""
        config, device = configs[0], context.device
        train = config.train
        self.config, self.data, self.context = config, data, context
        self.features = cached.reader if cached is not None else None
        if context.world_size > train.lanes:
            raise UserError(
                f"{context.world_size} workers for {train.lanes} lanes: a worker needs a lane of its own; "
                f"pass --train.lanes {context.world_size}"
            )
        choose_kernels(train, device)
        self.order = make_order(config, data.train)
        self.total_steps = min(train.epochs * self.order.steps_per_epoch, train.max_steps or 2**62)
        self.my_lanes = range(context.rank, train.lanes, context.world_size)
        if train.lanes % context.world_size:
            busiest = -(-train.lanes // context.world_size)
            say(
                context,
                f"{train.lanes} lanes on {context.world_size} workers: a step takes as long as {busiest} lanes, and "
                f"workers are busy {train.lanes / (busiest * context.world_size):.0%} of the time",
            )
        self.pipeline = make_pipeline(config.data.pipeline, config.data.image_size)
        self.is_resident = keeps_on_device(config.data, self.pipeline.train, data.train.num_rows, device)
        self._held_out: dict[int, list[LaneBatch]] = {}
        self.normalize = Normalizer(
            config.data.mean,
            config.data.std,
            device,
            parameter_dtype(train),
            uses_channels_last(train, device),
        )
        coding = cached.coding if cached is not None else None
        self.teacher = (
            build_teacher(configs, teacher, data.num_classes, device, coding) if teacher is not None else None
        )
        asked = {own.loss.resolved_negatives for own in configs if own.loss.uses_teacher}
        self.damage = DamageCounter(config.data.max_damaged, max(1, data.train.num_rows // context.world_size))
        self.feed = Feed(
            config,
            data.num_classes,
            self.pipeline.batch,
            self.normalize,
            self.teacher,
            self.damage,
            coding if self.features is not None else None,
            self._canary(),
            self._cached_negatives() if "cache" in asked else None,
            shares_vectors="step" in asked,
        )

    def _canary(self) -> CacheCheck | None:
        if self.features is None or self.teacher is None or not self.config.cache.canary:
            return None
        return CacheCheck(self.config, self.features, self.order, self.teacher)

    def _cached_negatives(self) -> CachedNegatives | None:
        if self.features is None:
            return None
        say(self.context, "collecting teacher vectors of the cache for negatives")
        return CachedNegatives(self.config, self.features)

    def batches(self, start_step: int) -> Iterator[LaneBatch]:
        """This worker's lanes of all remaining steps, on the device ahead of need."""
        if self.is_resident:
            return resident_batches(
                resident(
                    self.data.train,
                    self.pipeline.train,
                    self.context.device,
                    loader_workers=self.config.data.loader_workers,
                    read_ahead=self.config.data.read_ahead,
                ),
                self.order,
                views=self.config.data.views,
                lanes=self.my_lanes,
                start_step=start_step,
                stop_step=self.total_steps,
                features=self.features,
            )
        batches = train_batches(
            self.data.train,
            self.order,
            View(self.pipeline.train, self.config.view_seed),
            views=self.config.data.views,
            lanes=self.my_lanes,
            start_step=start_step,
            stop_step=self.total_steps,
            loader_workers=self.config.data.loader_workers,
            read_ahead=self.config.data.read_ahead,
            pin_memory=self.context.device.type == "cuda",
            features=self.features,
        )
        return to_device(batches, self.context.device)

    def cache_hit_rate(self) -> float | None:
        """Share of the blocks of images and cached features that this worker read ahead and its node had already; None
        where nothing is kept or read ahead."""
        store = self.features.store if self.features is not None else self.data.train.store
        return store.hit_rate() if store is not None else None

    def held_out(self, batch_size: int) -> Iterator[LaneBatch]:
        """This worker's slice of the held-out rows. Kept on the device where the training set is."""
        if batch_size in self._held_out:
            return iter(self._held_out[batch_size])
        batches = eval_batches(
            self.data.val,
            self.pipeline.eval,
            rank=self.context.rank,
            world_size=self.context.world_size,
            batch_size=batch_size,
            loader_workers=self.config.data.loader_workers,
            read_ahead=self.config.data.read_ahead,
        )
        if not self.is_resident:
            return batches
        device = self.context.device
        self._held_out[batch_size] = [batch.each_tensor(lambda tensor: tensor.to(device)) for batch in batches]
        return iter(self._held_out[batch_size])

    def close(self) -> None:
        """Take the hooks off the teacher, which other runs may use after this one."""
        if self.teacher is not None:
            self.teacher.tapped.release()
