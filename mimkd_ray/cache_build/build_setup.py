"""Preparation of a cache build: the data, the network and its entries, and the units of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mimkd_ray.config import Config
from mimkd_ray.config.cache import check_rules
from mimkd_ray.data.augment.pipelines import make_pipeline
from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.data.prepare.work_units import Done
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.errors import UserError
from mimkd_ray.taps.dry_checks import check_logits
from mimkd_ray.taps.tap_codecs import Coding, tap_entries
from mimkd_ray.taps.tapped_model import find_shapes
from mimkd_ray.teacher_cache import calibration
from mimkd_ray.teacher_cache.codec import needs_calibration
from mimkd_ray.teacher_cache.keys import Entry, Origin, calibration_url, logits_entry, parts_of, pixels_entry
from mimkd_ray.teacher_cache.pixel_digests import PIXELS, ROW_BYTES
from mimkd_ray.teacher_cache.writer import block_rows
from mimkd_ray.train.from_cache.cached_teacher import origin_of
from mimkd_ray.train.from_cache.fit_codecs import Sight
from mimkd_ray.train.networks.build import build_network, plan_student, teacher_images, teacher_taps
from mimkd_ray.train.networks.device_settings import place, teacher_autocast
from mimkd_ray.train.networks.teacher import Teacher
from mimkd_ray.train.networks.teacher_head import teacher_head
from mimkd_ray.train.networks.teacher_input import teacher_input


@dataclass(frozen=True)
class ShardUnit:
    """Features of `labels` to be made of positions `first`, ... in one view."""

    view: int
    first: int
    counts: tuple[int, ...]
    """Rows of the row groups."""
    labels: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Images."""
        return sum(self.counts)


@dataclass(frozen=True)
class CalibrationUnit:
    """Codecs of `labels` to be fitted."""

    labels: tuple[str, ...]
    rows: int
    """Images to look at."""


Unit = ShardUnit | CalibrationUnit
Seen = Callable[[int, int], None]
"""Takes (number of a unit, images of it that the teacher has seen)."""

Runner = Callable[[Sequence[Unit], Seen], Iterator[tuple[int, Done]]]
"""Does the units, in any order and anywhere, tells how far they are, and yields (number of the unit, what it did)."""


def shards_of(blocks: Blocks, shard_rows: int) -> list[tuple[int, tuple[int, ...]]]:
    """Cut a training set into shards of whole blocks, about `shard_rows` rows each: (first position, row groups)."""
    shards: list[tuple[int, tuple[int, ...]]] = []
    first, counts = 0, list[int]()
    for count in blocks.counts.tolist():
        if counts and sum(counts) + count > shard_rows:
            shards.append((first, tuple(block_rows(counts))))
            first, counts = first + sum(counts), []
        if count:
            counts.append(count)
    return [*shards, (first, tuple(block_rows(counts)))] if counts else shards


class Setup:
    """Data of a build: data, network, entries, and the parts of their keys. The same for driver and builders."""

    def __init__(self, config: Config, device: torch.device) -> None:
        """Raises UserError for a config that nothing can be cached for."""
        if not config.cache.root:
            raise UserError(
                "cache.root is not set: give the folder or URL of the cache, --cache.root s3://bucket/cache"
            )
        if not config.data.views:
            raise UserError("data.views is 0: give the number of views to cache, such as --data.views 8")
        if config.teacher.trains:
            raise UserError(
                f"teacher.{'train' if config.teacher.train else 'finetune'} is true: let a run train it, and then pass "
                "the weights that its teacher.json names, and --teacher.train and --teacher.finetune false"
            )
        self.config, self.device = config, device
        self.data = open_data(config.data)
        self.head = teacher_head(config, self.data)
        self.network: nn.Module = build_network(config, self.head.count, config.teacher.weights)
        size = teacher_input(config).size
        check_logits(self.network, size, self.head.count)
        self.origin: Origin = origin_of(config, self.data, self.network, device)
        self.planned = plan_student(config, self.network, self.data.num_classes, self.head.shared)
        shapes, vectors, maps = teacher_taps([self.planned])
        for text in config.cache.taps:
            tap, _, kind = text.partition(":")
            if kind not in ("", "map", "vector"):
                raise UserError(f"cache.taps {text!r}: give LAYER, LAYER:map or LAYER:vector")
            shapes |= find_shapes(self.network, size, [tap])
            as_map = kind == "map" or (not kind and shapes[tap].kind != "vector")
            if as_map and shapes[tap].kind == "vector":
                raise UserError(f"cache.taps {text!r}: the layer returns a vector, not a map")
            (maps if as_map else vectors).append(tap)
        self.vectors, self.maps, self.shapes = tuple(dict.fromkeys(vectors)), tuple(dict.fromkeys(maps)), shapes
        self.entries: list[Entry] = [
            *tap_entries(shapes, self.vectors, self.maps, config.cache),
            logits_entry(self.head.count, config.cache.logits),
            pixels_entry(ROW_BYTES),
        ]
        check_rules(config.cache, [*self.vectors, *self.maps])
        self.fitted = [entry for entry in self.entries if needs_calibration(entry.spec, entry.shape)]
        self.fitted = [entry for entry in self.fitted if entry.label != PIXELS]
        self.shards = shards_of(self.data.whole.blocks, config.cache.shard_rows)

    def calibration_url(self, entry: Entry) -> str:
        """Return the place of the numbers of an entry's codec."""
        return calibration_url(self.config.cache.root, entry, self.origin, self.config.cache.calibration_rows)

    def calibrations(self) -> dict[str, bytes | None]:
        """The calibrations that are there, and None for those that are not, by label."""
        return {entry.label: calibration.read(self.calibration_url(entry)) for entry in self.fitted}

    def parts(self, calibrations: Mapping[str, bytes | None]) -> dict[str, dict[str, Any]]:
        """The parts of all keys by label."""
        digests = {label: calibration.digest(value) for label, value in calibrations.items() if value is not None}
        return {e.label: parts_of(e, self.origin, digests.get(e.label, "")) for e in self.entries}

    def teacher(self, coding: Coding | None) -> Teacher:
        """The teacher with the taps of all entries."""
        model = place(self.network, self.config.train, self.device)
        autocast = teacher_autocast(self.config, self.device)
        return Teacher(
            model, self.shapes, self.vectors, self.maps, autocast, coding, teacher_images(self.config, self.device)
        )

    def sight(self, teacher: Teacher) -> Sight:
        """The training set as this teacher sees it."""
        pipeline = make_pipeline(self.config.data.pipeline, self.config.data.image_size)
        return Sight(self.config, self.data, pipeline, teacher, self.device)
