"""The whole typed configuration of a run, its JSON form and its digest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import cattrs
import cattrs.strategies
from cattrs.gen import make_dict_structure_fn

from mimkd_ray.cache.config import CacheConfig
from mimkd_ray.data.dataset import DataConfig
from mimkd_ray.data.mixing import MixConfig
from mimkd_ray.errors import UserError
from mimkd_ray.losses.config import LossConfig
from mimkd_ray.losses.methods import RIVALS, Method
from mimkd_ray.models.zoo import ModelConfig
from mimkd_ray.seeds import SEEDS, check_seed
from mimkd_ray.train.files import RunConfig
from mimkd_ray.train.optim import OptimConfig
from mimkd_ray.train.teacher import TeacherConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, precision and rhythm of training."""

    epochs: int = 240
    """Passes over the training rows."""
    max_steps: int = 0
    """Stop after this many steps (for a trial run; the schedule stays that of `epochs`); 0 trains to the end."""
    lanes: int = 1
    """Fixed slices of each global batch: batch norm and negatives see one lane, whatever the number of workers."""
    lane_batch: int = 64
    """Images in a lane; the global batch is lanes * lane_batch."""
    seed: int = 0
    """Seeds the student's start, the order, the views and the model's random numbers: 0 to 2**64 - 1."""
    precision: Literal["auto", "float32", "bf16", "float64"] = "auto"
    """Autocast of the networks; auto: bf16 on a GPU that has it, else float32. Losses always compute in float32."""
    channels_last: Literal["auto", "on", "off"] = "auto"
    """Memory layout of images and kernels; auto: channels-last, except for float64 on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on a GPU whose steps are not captured, where a C++ compiler is found."""
    engine: Literal["auto", "plain", "captured"] = "auto"
    """How steps run. captured: recorded once as a CUDA graph and replayed, where that is possible; a CPU then calls the
    same code each time. plain: operation by operation. auto: captured on a GPU."""
    ema_decay: float = 0.0
    """Keep an exponential moving average of the student with this decay, and evaluate and export it; 0 is off."""
    log_every: int = 50
    """Steps between two lines of metrics."""
    eval_every: int = 1
    """Epochs between two evaluations; 0 evaluates at the end only."""
    eval_batch: int = 0
    """Images in an evaluation batch; 0: the lane's."""
    information_rows: int = 2048
    """Held-out rows per worker on which mutual information is read at an evaluation; 0: it is not read."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.max_steps < 0 or self.lanes < 1 or self.log_every < 1 or self.eval_every < 0:
            raise UserError(
                f"train.epochs {self.epochs}, lanes {self.lanes} and log_every {self.log_every} must be at least 1; "
                f"max_steps {self.max_steps} and eval_every {self.eval_every} not negative"
            )
        check_seed("train.seed", self.seed)
        if self.lane_batch < 2:
            raise UserError(f"train.lane_batch is {self.lane_batch}: a lane needs 2 images, or it has no negatives")
        if self.information_rows < 0:
            raise UserError(f"train.information_rows is {self.information_rows}: give 0 (not read) or more")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"train.ema_decay is {self.ema_decay}; it must lie in [0, 1)")


Arm = Literal["alone"] | Method


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Train the same student in several ways and over several seeds, in one start of the workers."""

    seeds: int = 0
    """Seeds of every arm; a seed draws the student's start, the order and (with data.subset) the training rows.
    0: no comparison, one run of the config as it stands."""
    arms: tuple[Arm, ...] = ("alone", "mimkd")
    """alone: cross-entropy only. kd: that and Hinton's KD. mimkd: the config's loss. A rival of loss.name: the config's
    loss with that rival in the place of what it names."""
    kd_weight: float = 1.0
    """Weight of the KD term in the kd arm."""

    def __post_init__(self) -> None:
        if self.seeds < 0 or not self.arms or len(set(self.arms)) != len(self.arms):
            raise UserError(f"compare.seeds {self.seeds} must not be negative and compare.arms {self.arms} not repeat")


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Who runs the loop, on how many workers."""

    backend: Literal["ray", "local"] = "ray"
    """ray: Ray Train. local: this process, or the process group that torchrun made."""
    workers: int | str = 0
    """Training workers; 0: as many as the cluster has GPUs (else CPUs) for, at most `train.lanes`; 2..8: any number in
    that range, as nodes come and go."""
    cpus_per_worker: int = 0
    """CPUs that a worker reserves; 0: an equal share on CPU, and 1 + data.loader_workers with a GPU."""
    gpu: Literal["auto", "on", "off"] = "auto"
    """Whether a worker takes a GPU; auto: if the cluster has any."""
    address: str = ""
    """Address of a running Ray cluster; unset: RAY_ADDRESS, else a Ray of this process's own."""
    max_failures: int = 3
    """How often Ray restarts a failed worker group; each restart goes on from the last checkpoint."""
    max_preemptions: int = -1
    """How often Ray restarts it because a node was taken away with notice; -1: always."""
    resize_seconds: float = 60.0
    """With a range of workers: seconds between two looks for more nodes. A resize is a restart from a checkpoint."""
    wait_minutes: float = 0.0
    """How long to wait at the start for resources that a joined cluster lacks: an autoscaler may bring them."""
    lost_minutes: float = 30.0
    """Give up when nodes for the fewest workers have been gone for so long."""

    def __post_init__(self) -> None:
        fewest, most = self.worker_range
        if not 0 <= fewest <= most or (fewest == 0 and most > 0):
            raise UserError(f"launch.workers is {self.workers!r}: give a number, or a range such as 2..8")
        if min(self.cpus_per_worker, self.max_failures, self.resize_seconds, self.wait_minutes, self.lost_minutes) < 0:
            raise UserError(
                f"launch.cpus_per_worker {self.cpus_per_worker}, max_failures {self.max_failures}, resize_seconds "
                f"{self.resize_seconds}, wait_minutes {self.wait_minutes} and lost_minutes {self.lost_minutes} must "
                "not be negative"
            )

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers; (0, 0) where the launcher chooses."""
        parts = str(self.workers).split("..")
        if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
            raise UserError(f"launch.workers is {self.workers!r}: give a number, or a range such as 2..8")
        return int(parts[0]), int(parts[-1])


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a run depends on. A recipe returns one; the command line overrides any field."""

    recipe: str = "custom"
    """The recipe it came from; names the run directory."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    mix: MixConfig = field(default_factory=MixConfig)
    """Mixing of images within a lane: mixup and CutMix."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The strong network."""
    student: ModelConfig = field(default_factory=lambda: ModelConfig(name="cifar/resnet8_w4"))
    """The small network."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """The teacher's features, computed once."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What the student minimises."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batch, precision."""
    compare: CompareConfig = field(default_factory=CompareConfig)
    """Train several arms and seeds and compare them."""
    run: RunConfig = field(default_factory=RunConfig)
    """Where results go."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Who runs it."""

    def __post_init__(self) -> None:
        if self.cache.reads and self.mix.active:
            raise UserError(
                "mix.mixup_alpha or mix.cutmix_alpha is on, and cache.root is set: features of a mixed image are no "
                "mix of features; turn mixing off, or pass --cache.live true"
            )
        if self.cache.reads and not self.data.views:
            raise UserError(
                "cache.root is set and data.views is 0, a new view every epoch: nobody can have cached those; pass the "
                "number of views that are cached, such as --data.views 8"
            )
        if self.loss.resolved_negatives == "cache" and not self.cache.reads:
            raise UserError(
                "loss.negatives is cache, and the run reads none: pass --cache.root, or --loss.negatives step or all"
            )
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
        most = self.launch.worker_range[1]
        if most > self.train.lanes:
            raise UserError(
                f"launch.workers is {self.launch.workers} and train.lanes {self.train.lanes}: a worker needs a lane of "
                f"its own; pass --train.lanes {most} (and --train.lane-batch to keep the global batch)"
            )

    @property
    def view_seed(self) -> int:
        """The seed of the views in force."""
        return self.data.view_seed if self.data.view_seed >= 0 else self.train.seed


T = TypeVar("T")

_converter = cattrs.Converter(forbid_extra_keys=True)
cattrs.strategies.configure_union_passthrough(int | float | str | None, _converter)
_converter.register_structure_hook_factory(
    dataclasses.is_dataclass,
    lambda cls: make_dict_structure_fn(cls, _converter, _cattrs_forbid_extra_keys=True),
)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON form of a config."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type[T], value: Mapping[str, Any]) -> T:
    """Build a config from its JSON form; an unknown name or a wrong type is a :class:`UserError`.

    A config of release 0.1 means what it meant then."""
    value = _of_this_release(value)
    try:
        return _converter.structure(value, kind)
    except cattrs.BaseValidationError as error:
        user_errors = [e for e in _leaves(error) if isinstance(e, UserError)]
        if user_errors:
            raise user_errors[0] from None
        raise UserError("; ".join(cattrs.transform_error(error, path="config"))) from None


def _of_this_release(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with the names of this release. The preset `accuracy` of release 0.1 is `two_sided` now."""
    loss = value.get("loss", {})
    if loss.get("preset") == "accuracy" and "teacher" not in loss.get("critic", {"teacher": None}):
        return {**value, "loss": {**loss, "preset": "two_sided"}}
    return value


def _leaves(error: BaseException) -> list[BaseException]:
    inner = getattr(error, "exceptions", None)
    return [leaf for child in inner for leaf in _leaves(child)] if inner else [error]


_SECTIONS_NOT_IN_DIGEST = ("recipe", "run", "launch")
_NOT_IN_DIGEST = {
    "train": ("log_every", "eval_every", "eval_batch", "information_rows", "engine"),
    "data": ("loader_workers", "read_ahead", "store", "store_gb", "resident"),
    "cache": ("shard_rows", "batch", "workers", "canary", "tolerance"),
}
"""What may change between two starts of the same run: where it writes, who runs it, how often it looks."""


def training_part(value: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config's JSON form, the fields that decide what is trained."""
    return {
        section: {name: item for name, item in fields.items() if name not in _NOT_IN_DIGEST.get(section, ())}
        for section, fields in value.items()
        if section not in _SECTIONS_NOT_IN_DIGEST
    }


def training_dict(config: Config) -> dict[str, Any]:
    """The fields that decide what is trained, in JSON form."""
    return training_part(to_dict(config))


def digest(config: Config) -> str:
    """Hex digest of the fields that decide what is trained."""
    text = json.dumps(training_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of differing fields with both values: "train.lanes: 2 -> 4"."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found


def refuse_changes(run_dir: str, changed: list[str]) -> None:
    """Raise UserError if anything in ``changed`` (as from :func:`differences`) differs from how the run was begun."""
    if changed:
        raise UserError(
            f"{run_dir} was begun with another configuration ({'; '.join(changed)}): pass the old values, "
            "another --run.name, or --run.overwrite true to start anew"
        )
