"""What a training run holds: networks, optimiser, order and batches; how it takes a step and is saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mimkd_ray.data.dataset import Data
from mimkd_ray.data.loader import DamageCounter, LaneBatch, eval_batches, to_device, train_batches
from mimkd_ray.data.views import View, make_pipeline
from mimkd_ray.errors import UserError
from mimkd_ray.models.taps import TappedModel
from mimkd_ray.train import checkpoint
from mimkd_ray.train.build import (
    build_distiller,
    build_teacher,
    has_compiler,
    make_order,
    parameter_dtype,
    uses_channels_last,
)
from mimkd_ray.train.cache_check import CacheCheck
from mimkd_ray.train.cache_negatives import CachedNegatives
from mimkd_ray.train.cached import Cached
from mimkd_ray.train.config import Config, differences, refuse_changes, training_dict
from mimkd_ray.train.context import Context, gather_by_rank, is_distributed, share_from_first
from mimkd_ray.train.evaluate import accuracy, read_information
from mimkd_ray.train.feed import Feed
from mimkd_ray.train.metrics import say
from mimkd_ray.train.optim import build_optimizer, learning_rate
from mimkd_ray.train.step import LaneNorms, Normalizer, backward_lane, data_parallel, seed_lane


class StepRecord(NamedTuple):
    """What a step was: the mean breakdown of this worker's lanes, their sample ids, and the view."""

    log: dict[str, Tensor]
    ids: list[Tensor]
    view: int


class Session:
    """One run in one worker: ``step()`` advances it, ``evaluate()`` looks at it, ``save()`` is for a restart."""

    def __init__(
        self,
        config: Config,
        data: Data,
        teacher: torch.nn.Module | None,
        context: Context,
        cached: Cached | None = None,
    ) -> None:
        """``cached``: codecs and, where the run reads a cache, its features (train/cached.py)."""
        self.config, self.data, self.context = config, data, context
        self.features = cached.reader if cached is not None else None
        train, device = config.train, context.device
        if context.world_size > train.lanes:
            raise UserError(
                f"{context.world_size} workers for {train.lanes} lanes: a worker needs a lane of its own; "
                f"pass --train.lanes {context.world_size}"
            )
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
        self.normalize = Normalizer(
            config.data.mean,
            config.data.std,
            device,
            parameter_dtype(train),
            uses_channels_last(train, device),
        )
        coding = cached.coding if cached is not None else None
        self.teacher = build_teacher(config, teacher, data.num_classes, device, coding) if teacher is not None else None
        self.distiller = build_distiller(config, data.num_classes, teacher, device)
        self.ema = (
            AveragedModel(self.distiller.student, multi_avg_fn=get_ema_multi_avg_fn(train.ema_decay))
            if train.ema_decay
            else None
        )
        self.optimizer = build_optimizer(config.optim, self.distiller)
        self.norms = LaneNorms(self.distiller, len(self.my_lanes), train.lanes)
        self.model = data_parallel(self.distiller) if is_distributed() else self.distiller
        self._compile()
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
            self._cached_negatives(),
        )

    def _canary(self) -> CacheCheck | None:
        if self.features is None or self.teacher is None or not self.config.cache.canary:
            return None
        return CacheCheck(self.config, self.features, self.order, self.teacher)

    def _cached_negatives(self) -> CachedNegatives | None:
        if self.features is None or self.config.loss.resolved_negatives != "cache":
            return None
        say(self.context, "collecting teacher vectors of the cache for negatives")
        return CachedNegatives(self.config, self.features)

    def _compile(self) -> None:
        mode = self.config.train.compile
        if mode == "off" or (mode == "auto" and self.context.device.type != "cuda"):
            return
        if not has_compiler():
            say(self.context, "compilation is off: no C++ compiler (c++, g++ or clang++) was found")
            return
        # The graph holds recomputed chunks (a higher-order operator), which DDP's graph splitter refuses.
        torch._dynamo.config.optimize_ddp = False
        self.distiller.compile()
        if self.teacher is not None:
            self.teacher.tapped.compile()

    def batches(self, start_step: int) -> Iterator[LaneBatch]:
        """This worker's lanes of all remaining steps, on the device ahead of need."""
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

    def step(self, step: int, batches: Iterator[LaneBatch]) -> StepRecord:
        """One optimiser step over this worker's lanes."""
        config = self.config
        lr = learning_rate(config.optim, step, self.order.steps_per_epoch, config.train.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        self.norms.begin_step()
        logs: list[dict[str, Tensor]] = []
        ids: list[Tensor] = []
        weight = self.context.world_size / config.train.lanes
        for lane in self.feed.step(step, self.my_lanes, batches):
            seed_lane(config.train.seed, step, lane.number)
            last = lane.number == self.my_lanes[-1]
            logs.append(
                backward_lane(self.model, lane.images_BCHW, lane.labels_B, lane.ids_B, lane.teacher, weight, last)
            )
            ids.append(lane.ids_B)
            self.norms.end_lane()
        self.norms.end_step()
        if config.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.distiller.parameters(), config.optim.clip_norm)
        self.optimizer.step()
        self.distiller.loss.constrain_()
        if self.ema is not None:
            self.ema.update_parameters(self.distiller.student)
        return StepRecord({key: torch.stack([log[key] for log in logs]).mean() for key in logs[0]}, ids, lane.view)

    @contextmanager
    def settled(self) -> Iterator[None]:
        """A with-block in which batch-norm statistics are those of all workers. Every worker enters it."""
        with self.norms.averaged():
            self._ema_follows()
            yield
        self._ema_follows()

    def _ema_follows(self) -> None:
        """The moving average has no statistics of its own: it shows the student's."""
        if self.ema is not None:
            for buffer, of_student in zip(self.ema.module.buffers(), self.distiller.student.buffers(), strict=True):
                buffer.copy_(of_student)

    def exported(self) -> torch.nn.Module:
        """The network that users get: the student, or its moving average."""
        tapped = self.ema.module if self.ema is not None else self.distiller.student
        assert isinstance(tapped, TappedModel)
        return tapped.model

    def held_out(self, batch_size: int) -> Iterator[LaneBatch]:
        """This worker's slice of the held-out rows."""
        return eval_batches(
            self.data.val,
            self.pipeline.eval,
            rank=self.context.rank,
            world_size=self.context.world_size,
            batch_size=batch_size,
            loader_workers=self.config.data.loader_workers,
        )

    def evaluate(self) -> dict[str, Any]:
        """Held-out top-1, top-5, cross-entropy, and mutual information per term. Training goes on as if nobody had
        looked."""
        with self.settled():
            network = self.exported()
            training = network.training
            network.eval()
            batches = self.held_out(self.config.train.eval_batch or self.config.train.lane_batch)
            measured = accuracy(network, batches, self.normalize, self.config.data.max_damaged)
            network.train(training)
            values: dict[str, Any] = measured._asdict()
            if self.teacher is not None and self.distiller.loss.plan:
                # In batches of a lane, so that held-out nats have the ceiling of those in training.
                lanes = self.held_out(self.config.train.lane_batch)
                values |= read_information(self.distiller, self.teacher, lanes, self.normalize)
        return values

    def close(self) -> None:
        """Take the hooks off the teacher, which other runs may use after this one."""
        if self.teacher is not None:
            self.teacher.tapped.release()

    def save(self, step: int, writer: checkpoint.Writer | None) -> None:
        """Checkpoint after ``step`` steps. Every worker takes part; the first has the writer."""
        own_statistics = gather_by_rank(self.norms.flat().cpu())
        with self.settled():
            if writer is not None:
                writer.save(step, self.state(step, own_statistics))

    def state(self, step: int, own_statistics: list[Tensor]) -> dict[str, Any]:
        """Everything a restart needs. The order, the views and the model's random numbers follow from the step.

        Batch-norm statistics are in it twice: averaged over workers, for any number of them, and each worker's own,
        with which the same number of workers goes on bit for bit.
        """
        return {
            "step": step,
            "config": training_dict(self.config),
            "data": self.data.digest,
            "distiller": self.distiller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "own_statistics": own_statistics,
        }

    def resume(self, run_dir: str) -> int:
        """Load the newest checkpoint of the run, if any. Returns the step to go on from (0 at the start)."""
        # The first worker chooses: a straggler of an earlier start may commit another one meanwhile.
        found = checkpoint.newest(run_dir) if self.context.rank == 0 else None
        folder = share_from_first(found[0] if found else None)
        if folder is None:
            return 0
        state = checkpoint.parse(found[1] if found else checkpoint.read(folder), self.context.device)
        changed = differences(state["config"], training_dict(self.config))
        if state["data"] != self.data.digest:
            changed.append(f"the data set's digest: {state['data'][:12]} -> {self.data.digest[:12]}")
        refuse_changes(run_dir, changed)
        self.distiller.load_state_dict(state["distiller"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if len(state["own_statistics"]) == self.context.world_size:
            self.norms.load(state["own_statistics"][self.context.rank])
            self._ema_follows()
        return int(state["step"])
