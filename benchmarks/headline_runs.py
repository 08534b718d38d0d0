"""The runs of the headline study: their configs, the twin's data and cache, and packs of arms."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from deadline import Deadline
from safetensors.torch import load_file

from mimkd_ray.cli.local_launch import pick_device
from mimkd_ray.config import (
    CacheConfig,
    Config,
    LaunchConfig,
    LossConfig,
    MixConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.json_files import read_json
from mimkd_ray.models.build_model import build_model
from mimkd_ray.recipes import cifar100
from mimkd_ray.train.job import measure
from mimkd_ray.train.networks.build import build_network
from mimkd_ray.train.networks.device_settings import place
from mimkd_ray.train.packed import Member, train_pack
from mimkd_ray.train.records.outcomes import Failed
from mimkd_ray.train.records.run_dir import write_json

PER_CLASS, CHOOSE_PER_CLASS, TEST_ROWS, VIEWS = 50, 40, 4000, 6
"""The twin: training images and images to choose by of each class, test images, and views of each training image."""

MIXES = {"mixup": MixConfig(mixup_alpha=1.0), "cutmix": MixConfig(cutmix_alpha=1.0)}
"""Mixing of the images of every batch, with shares drawn evenly from 0 to 1."""


@dataclass(frozen=True)
class Pack:
    """Arms of one seed that train together."""

    name: str
    base: Config
    losses: Mapping[str, LossConfig]
    root: Path

    def config(self, arm: str) -> Config:
        """Return the run of an arm."""
        return replace(self.base, recipe=arm, loss=self.losses[arm])

    def folder(self, arm: str) -> Path:
        """Return the directory of an arm."""
        return self.root / self.name / arm / f"seed{self.base.train.seed}"

    def members(self) -> list[Member]:
        """Return the members of the pack, all arms."""
        return [Member(self.config(arm), str(self.folder(arm))) for arm in self.losses]


def make_twin(source: Path, target: Path) -> None:
    """Write the twin's images: `train` has the first 50 of each class in the first training file, `choose` the 40 of
    each class that follow, `test` the first 4,000 test images."""
    if (target / "test-00000.parquet").exists():
        return
    import pyarrow as pa  # here: a GPU machine may have none, and train from class folders
    import pyarrow.parquet as pq

    target.mkdir(parents=True, exist_ok=True)
    whole = pq.read_table(sorted(source.glob("train-*.parquet"))[0])
    seen: dict[int, int] = {}
    train, choose = [], []
    for row, label in enumerate(whole["label"].to_pylist()):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= PER_CLASS:
            train.append(row)
        elif seen[label] <= PER_CLASS + CHOOSE_PER_CLASS:
            choose.append(row)
    test = pq.read_table(sorted(source.glob("test-*.parquet"))[0]).slice(0, TEST_ROWS)
    for split, table in (
        ("train", whole.take(pa.array(train))),
        ("choose", whole.take(pa.array(choose))),
        ("test", test),
    ):
        pq.write_table(table, target / f"{split}-00000.parquet", row_group_size=500)


def draws(loss: LossConfig) -> bool:
    """Return whether a loss draws random numbers in a step: CRD's negatives, or the locations of a local term."""
    return "crd" in loss.name or (loss.weight("local") > 0 and loss.resolved_locations > 0)


def twin(root: Path, data: Path, teacher: str, student: str, epochs: int, seed: int, live: bool = False) -> Config:
    """Return a run of the twin: six views that a ShuffleNetV2 sees, cached or ``live``, a small student, SGD with a
    cosine. Evaluations are rarer with a live teacher, because on a GPU they take longer than training."""
    cache = CacheConfig(root=str(root / "cache"), codecs=("maps=fp16", "vectors=fp16"), canary=0.0)
    base = cifar100("twin", "shufflenet_v2", "resnet8")
    return replace(
        base,
        data=replace(
            base.data,
            root=str(data),
            val_split="choose",
            views=VIEWS,
            view_seed=0,
            resident="on",
            loader_workers=0,
            store=str(root / "store"),
        ),
        teacher=replace(base.teacher, name="cifar/shufflenet_v2", weights=teacher),
        student=ModelConfig(name=student),
        cache=CacheConfig() if live else cache,
        optim=OptimConfig(lr=0.1, nesterov=True, weight_decay=5e-4, schedule="cosine", warmup_epochs=2),
        train=replace(
            base.train,
            epochs=epochs,
            seed=seed,
            precision="float32",
            compile="off",
            information_rows=512,
            eval_every=10 if live else 3,
            eval_batch=2000 if live else 250,
        ),
        launch=LaunchConfig(backend="local"),
        run=RunConfig(checkpoint_every=0, checkpoint_minutes=3, tensorboard=False),
    )


def protocol(
    pair: tuple[str, str], data: str, teacher: str, epochs: int, batch: int, seed: int, holdout: float
) -> Config:
    """Return a run on all of CIFAR-100 with a live teacher and a cosine schedule."""
    base = cifar100("headline", *pair)
    return replace(
        base,
        data=replace(base.data, root=data, holdout=holdout, resident="on"),
        teacher=replace(base.teacher, weights=teacher),
        optim=replace(base.optim, lr=0.05, schedule="cosine", warmup_epochs=1),
        train=replace(
            base.train,
            epochs=epochs,
            lane_batch=batch,
            eval_every=5,
            eval_batch=2000,
            information_rows=1024,
            seed=seed,
            compile="off",
        ),
        launch=LaunchConfig(backend="local"),
        run=RunConfig(checkpoint_every=0, checkpoint_minutes=3, tensorboard=False),
    )


def cache_for(losses: Sequence[LossConfig], base: Config, threads: int) -> None:
    """Build the cache of everything that the arms read of the teacher."""
    from mimkd_ray.cache_build.build_cache import build  # here, as pyarrow
    from mimkd_ray.cache_build.build_setup import Setup
    from mimkd_ray.cache_build.build_units import in_process

    torch.set_num_threads(threads)
    every = replace(
        LossConfig(preset="best"),
        local_weight=1.0,
        feature_pairs=tuple(dict.fromkeys(pair for loss in losses for pair in loss.feature_pairs)),
    )
    setup = Setup(replace(base, loss=every), pick_device(base.launch, 0))
    build(setup, in_process(setup))


def train_together(pack: Pack, at: float = float("inf"), threads: int = 1) -> dict[str, float]:
    """Train the arms of a pack to their ends; return their seconds. Finished arms cost nothing. Raises Interrupted at
    the time ``at``."""
    torch.set_num_threads(threads)
    context = Deadline(pick_device(pack.base.launch, 0), at)
    data = open_data(pack.base.data)
    teacher = None
    if any(loss.uses_teacher for loss in pack.losses.values()):
        teacher = build_network(pack.base, data.num_classes, pack.base.teacher.weights)
        teacher = place(teacher, pack.base.train, context.device).eval().requires_grad_(False)
    began = time.monotonic()
    outcomes = train_pack(pack.members(), data, teacher, context)
    for arm, outcome in zip(pack.losses, outcomes, strict=True):
        if isinstance(outcome, Failed):
            print(f"{pack.name} {arm}: {outcome.error}", flush=True)
        elif pack.base.data.val_split == "choose":
            test_of(pack.config(arm), pack.folder(arm), context)
    return {arm: (time.monotonic() - began) / len(pack.losses) for arm in pack.losses}


def test_of(config: Config, folder: Path, context: Deadline) -> dict[str, Any]:
    """Return the test accuracy of a finished student of the twin, measured once."""
    file = str(folder / "test.json")
    known = read_json(file)
    if known is not None:
        return known
    config = replace(config, data=replace(config.data, val_split="test", resident="off"))
    data = open_data(config.data)
    network = build_model(config.student.name, data.num_classes, "random", config.data.image_size)
    network.load_state_dict(load_file(folder / "student.safetensors"))
    place(network, config.train, context.device).eval()
    with torch.no_grad():
        found = measure(network, config, data, context)
    write_json(file, found)
    return found
