"""The input of a step: images in their views on the device, mixed, with the teacher's features. One object for all
students of a process, which share the order, the batches and the teacher."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mimkd_ray.config import LossConfig
from mimkd_ray.data.augment.batch_views import view_key
from mimkd_ray.data.augment.mixing import Mix, draw_mix, mix, mix_by_numbers
from mimkd_ray.data.augment.pipelines import make_pipeline
from mimkd_ray.data.loading.batches import LaneBatch
from mimkd_ray.data.loading.damaged_images import DamageCounter
from mimkd_ray.data.loading.loader import eval_batches, to_device, train_batches
from mimkd_ray.data.loading.resident import keeps_on_device, resident, resident_batches
from mimkd_ray.data.sources.data_set import Data
from mimkd_ray.errors import UserError, count
from mimkd_ray.losses.features import Features, Others
from mimkd_ray.losses.teacher_queue import NO_LABEL, class_numbers
from mimkd_ray.train.distributed import Context, all_but, gather_lanes
from mimkd_ray.train.from_cache.cached_negatives import CachedNegatives
from mimkd_ray.train.from_cache.cached_teacher import Cached
from mimkd_ray.train.from_cache.live_check import CacheCheck
from mimkd_ray.train.held_out.accuracy import told_batches
from mimkd_ray.train.held_out.captured_forwards import RecordedForwards
from mimkd_ray.train.networks.build import PlannedStudent, build_teacher, make_order
from mimkd_ray.train.networks.device_settings import captures, choose_kernels, parameter_dtype, uses_channels_last
from mimkd_ray.train.networks.student_module import Normalizer
from mimkd_ray.train.records.progress import say


class Lane(NamedTuple):
    """One lane of one step, ready for the student."""

    number: int
    view: int
    images_BCHW: Tensor  # normalised, on the device
    labels_B: Tensor  # class numbers, or (B, classes) probabilities of mixed images
    ids_B: Tensor
    teacher: Features | None


class Inputs:
    """Gives the steps of one student, or of all students of a pack, what they train on.

    ``start(step)``, then ``step(i)`` for the lanes of each step in turn, of this worker: their views are finished on
    the device, they are mixed, and the teacher is run or its cached features are decoded. The batches are read ahead.

    One lane is held at a time, for all students of a pack. With ``negatives=step`` all of this worker's lanes are,
    because their teacher vectors go to the other workers before the first lane is trained on.
    """

    def __init__(
        self,
        planned: Sequence[PlannedStudent],
        data: Data,
        teacher: nn.Module | None,
        context: Context,
        cached: Cached | None = None,
    ) -> None:
        """The students' configs agree in data, mixing, cache, teacher and lanes. ``teacher``: its taps are those that
        any of them reads; None: none does. ``cached``: codecs and, where the run reads a cache, its features
        (train/from_cache/cached_teacher.py); the teacher is then asked for a few lanes alone, to check them."""
        config, device = planned[0].config, context.device
        train = config.train
        self.config, self.data, self.context, self.students = config, data, context, len(planned)
        if context.world_size > train.lanes:
            raise UserError(
                f"{count(context.world_size, 'worker')} for {count(train.lanes, 'lane')}: a worker needs a "
                f"lane of its own; pass --train.lanes {context.world_size}"
            )
        choose_kernels(train, device)
        self.order = make_order(config, data.train)
        self.total_steps = min(train.epochs * self.order.steps_per_epoch, train.max_steps or 2**62)
        self.my_lanes = range(context.rank, train.lanes, context.world_size)
        if train.lanes % context.world_size:
            busiest = -(-train.lanes // context.world_size)
            say(
                context,
                f"{count(train.lanes, 'lane')} on {count(context.world_size, 'worker')}: a step takes as "
                f"long as {count(busiest, 'lane')}, and workers are busy "
                f"{train.lanes / (busiest * context.world_size):.0%} of the time",
            )
        self.pipeline = make_pipeline(config.data.pipeline, config.data.image_size)
        self.is_resident = keeps_on_device(config.data, self.pipeline.train, data.train.num_rows, device)
        self.normalize = Normalizer(
            config.data.mean,
            config.data.std,
            device,
            parameter_dtype(train),
            uses_channels_last(train, device),
        )
        coding = cached.coding if cached is not None else None
        self.features = cached.reader if cached is not None else None
        self.decoder = coding if self.features is not None else None
        losses = [one.config.loss for one in planned]
        asked = {loss.resolved_negatives for loss in losses if loss.uses_teacher}
        self.negatives = self._cached_negatives(losses) if "cache" in asked else None
        # Hooks come last: an error before them leaves none on the teacher, which other runs may use.
        self.teacher = build_teacher(planned, teacher, device, coding) if teacher is not None else None
        self.shares_vectors = "step" in asked and self.teacher is not None and bool(self.teacher.vectors)
        self.check = self._canary()
        self.damage = DamageCounter(config.data.max_damaged, max(1, data.train.num_rows // context.world_size))
        self.waited = 0.0  # seconds that steps waited for the loader
        self._batches: Iterator[LaneBatch] | None = None
        self.eval_batch = train.eval_batch or train.lane_batch
        self.forwards = RecordedForwards(context, self.eval_batch) if captures(train, device) else None
        self._held_out: dict[int, list[LaneBatch]] = {}

    def _canary(self) -> CacheCheck | None:
        if self.features is None or self.teacher is None or not self.config.cache.canary:
            return None
        return CacheCheck(self.config, self.features, self.order, self.teacher)

    def _cached_negatives(self, losses: Sequence[LossConfig]) -> CachedNegatives | None:
        if self.features is None:
            return None
        say(self.context, "collecting teacher vectors of the cache for negatives")
        leave_out = any(loss.resolved_same_class == "leave_out" for loss in losses)
        known = leave_out and self.config.data.labels != "none"
        return CachedNegatives(self.config, self.features, self.data.train if known else None)

    def start(self, step: int, batches: Iterator[LaneBatch] | None = None) -> None:
        """Begin reading at ``step``. ``batches``, made beforehand, take the place of the data set's."""
        self._batches = batches if batches is not None else self._read(step)

    def step(self, step: int) -> Iterable[Lane]:
        """Return this worker's lanes of the step, in their order. Steps are asked for one after the other, from where
        reading began."""
        return self._with_others(self._lane(step, self._next(step, lane)) for lane in self.my_lanes)

    def batches_of(self, step: int) -> list[LaneBatch]:
        """Return the batches of this worker's lanes of the step, for :meth:`lanes_of` of a captured step."""
        return [self._next(step, lane) for lane in self.my_lanes]

    def lanes_of(
        self, batches: Sequence[LaneBatch], keys: Sequence[Tensor], mixes: Sequence[Tensor | None]
    ) -> Iterable[Lane]:
        """Return the lanes of a step from batches in buffers, without a word to the host. ``keys`` are of their views,
        ``mixes`` the numbers of :meth:`mix_of`'s. Negatives from a cache need the host: :meth:`step` alone has them.
        """
        return self._with_others(
            self._with_teacher(self._mixed(self._finish(batch, key)[1], numbers), batch.features)
            for batch, key, numbers in zip(batches, keys, mixes, strict=True)
        )

    def mix_of(self, step: int, batch: LaneBatch) -> Mix | None:
        """Return how a batch is mixed; None if it is not."""
        mixing, seed = self.config.mix, self.config.train.seed
        return draw_mix(mixing, seed, step, batch.lane, *batch.images_BCHW.shape[2:]) if mixing.active else None

    def _mixed(self, lane: Lane, what: Mix | Tensor | None) -> Lane:
        """Mix a lane by what was drawn for it, or by the numbers of that, which a graph reads."""
        if not self.config.mix.active:
            return lane
        known_B = lane.labels_B.clamp(min=0)  # no label is read where data.labels is none
        if isinstance(what, Tensor):
            images, labels_B = mix_by_numbers(lane.images_BCHW, known_B, self.data.num_classes, what)
        else:
            images, labels_B = mix(lane.images_BCHW, known_B, self.data.num_classes, what)
        return lane._replace(images_BCHW=images, labels_B=labels_B)

    def check_cached(self, step: int, batch: LaneBatch) -> None:
        """Compare the cached features of a batch with the live teacher's where that is due."""
        if self.check is not None and self.check.due(step, batch.lane):
            pixels, lane = self._finish(batch, view_key(batch.view, self.config.view_seed))
            self._look(batch, pixels, self._with_teacher(lane, batch.features))

    def _read(self, start: int) -> Iterator[LaneBatch]:
        """This worker's batches of all remaining steps, on the device ahead of need."""
        if self.is_resident:
            return resident_batches(
                resident(self.data.train, self.config.data, self.context.device),
                self.order,
                views=self.config.data.views,
                lanes=self.my_lanes,
                start_step=start,
                stop_step=self.total_steps,
                features=self.features,
            )
        batches = train_batches(
            self.data.train,
            self.config.data,
            self.order,
            self.config.view_seed,
            lanes=self.my_lanes,
            start_step=start,
            stop_step=self.total_steps,
            pin_memory=self.context.device.type == "cuda",
            features=self.features,
        )
        return to_device(batches, self.context.device)

    def _next(self, step: int, lane: int) -> LaneBatch:
        """Return the next batch, which is that of a step's lane. Damaged images in it are counted."""
        if self._batches is None:
            self.start(step)
        assert self._batches is not None
        asked = time.perf_counter()
        batch = next(self._batches)
        self.waited += time.perf_counter() - asked
        self.context.times.mark("first_batch")
        assert (batch.step, batch.lane) == (step, lane), f"step {step} lane {lane} got {batch.step} {batch.lane}"
        self.damage.add(batch)
        return batch

    def _lane(self, step: int, batch: LaneBatch) -> Lane:
        pixels, ready = self._finish(batch, view_key(batch.view, self.config.view_seed))
        ready = self._with_teacher(self._mixed(ready, self.mix_of(step, batch)), batch.features)
        if self.check is not None and self.check.due(step, batch.lane):
            self._look(batch, pixels, ready)
        if self.negatives is not None:
            assert self.decoder is not None
            assert ready.teacher is not None
            rows, ids_M, labels_M = self.negatives.draw(step, batch.lane, ready.images_BCHW.device)
            others = Others(self.decoder.decode(rows).vectors, ids_M, labels_M)
            ready = ready._replace(teacher=ready.teacher._replace(others=others))
        return ready

    def _finish(self, batch: LaneBatch, key: int | Tensor) -> tuple[Tensor, Lane]:
        """Return a batch's images in their view, uint8, and the lane with them normalised. ``key``: the view's."""
        images = batch.images_BCHW
        if self.pipeline.batch is not None:
            images = self.pipeline.batch(images, batch.ids_B, key)
        labels_B = batch.labels_B
        if self.config.data.labels == "none":
            labels_B = torch.full_like(labels_B, NO_LABEL)
        return images, Lane(batch.lane, batch.view, self.normalize(images), labels_B, batch.ids_B, None)

    def _with_teacher(self, lane: Lane, cached: Mapping[str, Tensor]) -> Lane:
        """Give a lane what its cached features say, or, without a cache, what the teacher says of its images."""
        if self.decoder is not None:
            return lane._replace(teacher=self.decoder.decode(cached))
        if self.teacher is not None:
            return lane._replace(teacher=self.teacher.features(lane.images_BCHW))
        return lane

    def _look(self, batch: LaneBatch, pixels_BCHW: Tensor, lane: Lane) -> None:
        assert self.check is not None
        assert lane.teacher is not None
        self.check.look(batch, pixels_BCHW, lane.images_BCHW, lane.teacher)

    def _with_others(self, lanes: Iterable[Lane]) -> Iterable[Lane]:
        """Give each lane the teacher vectors of all other lanes of the step, where any loss asks for them."""
        return self._exchanged(list(lanes)) if self.shares_vectors else lanes

    def _exchanged(self, mine: list[Lane]) -> list[Lane]:
        lanes = self.config.train.lanes
        features = [lane.teacher for lane in mine if lane.teacher is not None]
        vectors_LBC = {
            tap: gather_lanes(torch.stack([f.vectors[tap].float() for f in features]), lanes)
            for tap in features[0].vectors
        }
        ids_LB = gather_lanes(torch.stack([lane.ids_B for lane in mine]), lanes)
        classes = [class_numbers(lane.labels_B, lane.ids_B) for lane in mine]
        labels_LB = gather_lanes(torch.stack(classes), lanes)
        ready = []
        for lane, own in zip(mine, features, strict=True):
            others = Others(
                {tap: all_but(lane.number, v).flatten(0, 1) for tap, v in vectors_LBC.items()},
                all_but(lane.number, ids_LB).flatten(),
                all_but(lane.number, labels_LB).flatten(),
            )
            ready.append(lane._replace(teacher=own._replace(others=others)))
        return ready

    def cache_hit_rate(self) -> float | None:
        """Share of the blocks of images and cached features that this worker read ahead and its node had already; None
        where nothing is kept or read ahead."""
        store = self.features.store if self.features is not None else self.data.train.store
        return store.hit_rate() if store is not None else None

    def held_out(self, batch_size: int, what: str = "held-out images", rows: int = 0) -> Iterator[LaneBatch]:
        """This worker's slice of the held-out rows. Kept on the device where the training set is. ``what`` is told of
        them; ``rows``: so many will do."""
        batches = self._held_out_batches(batch_size)
        return told_batches(batches, self.data.val, self.context.world_size, what, rows=rows)

    def _held_out_batches(self, batch_size: int) -> Iterator[LaneBatch]:
        if batch_size in self._held_out:
            return iter(self._held_out[batch_size])
        context = self.context
        batches = eval_batches(self.data.val, self.config.data, batch_size, context.rank, context.world_size)
        if not self.is_resident:
            return to_device(batches, context.device)
        self._held_out[batch_size] = [batch.each_tensor(lambda tensor: tensor.to(context.device)) for batch in batches]
        return iter(self._held_out[batch_size])

    def close(self) -> None:
        """End reading, free graphs, and take the hooks off the teacher, which other runs may use after this one."""
        self._batches = self.forwards = None
        if self.teacher is not None:
            self.teacher.tapped.release()
