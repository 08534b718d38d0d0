"""The whole typed configuration of a run: its sections, and the checks between sections."""

from __future__ import annotations

from dataclasses import dataclass, field

from mimkd_ray.config.cache import CacheConfig
from mimkd_ray.config.compare import CompareConfig
from mimkd_ray.config.data import DataConfig
from mimkd_ray.config.form.codec_spec import parse_logits
from mimkd_ray.config.form.values import check_values
from mimkd_ray.config.launch import LaunchConfig
from mimkd_ray.config.loss import LossConfig
from mimkd_ray.config.mix import MixConfig
from mimkd_ray.config.model import ModelConfig
from mimkd_ray.config.optim import OptimConfig
from mimkd_ray.config.run import RunConfig
from mimkd_ray.config.storage import StorageConfig
from mimkd_ray.config.teacher import TeacherConfig
from mimkd_ray.config.train import TrainConfig
from mimkd_ray.errors import UserError
from mimkd_ray.losses.methods.registry import RIVALS
from mimkd_ray.places import NAME_BYTES, check_name, is_function
from mimkd_ray.seeds import SEEDS

MOST_LANE_BYTES = 32 * 10**9
"""Of a lane's pixels in float32: activations take several times as much, and no device has that."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The complete configuration of a run. A recipe returns one; the command line overrides any field."""

    recipe: str = "custom"
    """Name of the recipe that made this config; part of the run directory's name."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    mix: MixConfig = field(default_factory=MixConfig)
    """Mixing of images within a lane: mixup and CutMix."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The strong network."""
    student: ModelConfig = field(default_factory=lambda: ModelConfig(name="cifar/resnet8_w4"))
    """The small network."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """The cache of the teacher's features."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The terms that the student minimises."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batch, precision."""
    compare: CompareConfig = field(default_factory=CompareConfig)
    """Comparison of several arms and seeds."""
    run: RunConfig = field(default_factory=RunConfig)
    """The run directory and its checkpoints."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """The workers and their machines."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """How long a run waits for its places."""

    def __post_init__(self) -> None:
        check_values(self)
        check_name("recipe", self.recipe, limit=2 * NAME_BYTES)  # derived ones are longer, and name no folder
        pixels = 12 * self.train.lane_batch * self.data.image_size**2
        if pixels > MOST_LANE_BYTES:
            raise UserError(
                f"train.lane_batch is {self.train.lane_batch:,} and data.image_size {self.data.image_size}: the "
                f"pixels of one lane take {pixels / 1e9:,.0f} GB, of at most {MOST_LANE_BYTES / 1e9:.0f}: give less"
            )
        if self.cache.reads and self.mix.active:
            raise UserError(
                "mix.mixup_alpha or mix.cutmix_alpha is on, and cache.root is set: features of a mixed image are no "
                "mix of features; turn mixing off, or pass --cache.live true"
            )
        if self.cache.reads and is_function(self.data.root):
            raise UserError(
                f"data.root {self.data.root} is a function, and cache.root is set: teacher caches are of images at "
                "rest, which have a digest; leave cache.root out, or prepare the images as files (jobs/prepare_data.py)"
            )
        if self.cache.reads and not self.data.views:
            raise UserError(
                "cache.root is set and data.views is 0, a new view every epoch: nobody can have cached those; pass the "
                "number of views that are cached, such as --data.views 8"
            )
        if self.loss.kd_logits == "standardised" and parse_logits(self.cache.logits).top:
            raise UserError(
                f"loss.kd_logits is standardised, by the mean and deviation of all of the teacher's logits, and "
                f"cache.logits is {self.cache.logits}: pass --cache.logits fp16, or --loss.kd-logits raw"
            )
        if self.loss.resolved_negatives == "cache" and not self.cache.reads:
            raise UserError(
                "loss.negatives is cache, and the run reads none: pass --cache.root, or --loss.negatives step or all"
            )
        self._check_labels()
        if not (self.loss.resolved_ce_weight or self.loss.uses_teacher):
            raise UserError(
                "loss.ce_weight is 0, and no other term is on: the student would learn nothing; give --loss.ce-weight, "
                "or --loss.name"
            )
        self._check_head_epochs()
        one_class = [method for method in self.loss.rivals if RIVALS[method].one_class]
        if one_class and self.mix.active:
            raise UserError(
                f"loss.name has {' and '.join(one_class)}, for images of one class, and mix.mixup_alpha or "
                "mix.cutmix_alpha is on: turn mixing off, or choose another loss"
            )
        banks = [method for method in self.loss.rivals if RIVALS[method].bank]
        if banks and self.train.lanes > 1:
            batch = self.train.lanes * self.train.lane_batch
            raise UserError(
                f"loss.name has {' and '.join(banks)}, whose memory banks change within a step, and train.lanes is "
                f"{self.train.lanes}: pass --train.lanes 1 --train.lane-batch {batch}"
            )
        if self.train.seed + self.compare.seeds > SEEDS:
            raise UserError(
                f"compare.seeds {self.compare.seeds} counts up from train.seed {self.train.seed}, past {SEEDS - 1}: "
                "give a smaller train.seed"
            )
        self._check_workers()

    def _check_workers(self) -> None:
        """Raise UserError if there are more workers than lanes."""
        most = self.launch.worker_range[1]
        if most > self.train.lanes:
            raise UserError(
                f"launch.workers is {self.launch.workers} and train.lanes {self.train.lanes}: a worker needs a lane of "
                f"its own; pass --train.lanes {most} (and --train.lane-batch to keep the global batch)"
            )

    def _check_head_epochs(self) -> None:
        teacher, own = self.teacher, self.teacher.epochs or self.train.epochs
        for name, head, all_epochs in (
            ("teacher", teacher.head_epochs if teacher.finetune else 0, own),
            ("student", self.student.head_epochs, self.train.epochs),
        ):
            if head and head >= all_epochs:
                raise UserError(
                    f"{name}.head_epochs is {head}, of {all_epochs} epochs: none is left for the whole network; give "
                    "fewer, or 0"
                )

    def _check_labels(self) -> None:
        """Raise UserError for what needs labels that ``data.labels`` says are not there."""
        labels = self.data.labels
        if labels == "all":
            return
        reads = [method for method in self.loss.rivals if RIVALS[method].one_class]
        if reads:
            raise UserError(
                f"loss.name has {' and '.join(reads)}, which reads the label of every image, and data.labels is "
                f"{labels}: choose another loss"
            )
        if labels == "partial":
            if self.mix.active:
                raise UserError(
                    "mix.mixup_alpha or mix.cutmix_alpha is on, and data.labels is partial: a mix of images with and "
                    "without a label has none; turn mixing off, or pass --data.labels none"
                )
            return
        alone = self.compare.seeds and "alone" in self.compare.arms
        if self.teacher.trains or alone or not self.loss.uses_teacher:
            trained = "teacher.train" if self.teacher.train else "teacher.finetune"
            what = trained if self.teacher.trains else "arm alone" if alone else "the loss"
            raise UserError(
                f"data.labels is none, and {what} has nothing but labels to learn from: distil features or logits "
                "(--loss.name mimkd) of a teacher that is there (--teacher.weights)"
            )

    @property
    def view_seed(self) -> int:
        """The seed of the views that is in effect."""
        return self.data.view_seed if self.data.view_seed >= 0 else self.train.seed
