"""Building a cache: which features are missing, computing them unit by unit, and publishing what is complete.

A unit is a shard of the training set in one view. Whoever does it (Ray Data on all nodes, or this process) decodes and
augments with the loader of training, in loader processes of its own, so pixels travel through no object store; runs the
teacher on batches that begin with the unit, so that a unit done again on a CPU gives the same bytes; encodes on the
device; and writes one file for each entry, each with its commit record. A unit that was done for some entries is done
for the others alone. When all units of a view are there, its manifests are published: readers see nothing before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mimkd_ray import storage
from mimkd_ray.cache import calibration, manifest
from mimkd_ray.cache.codec import DTYPES, coded_shape, needs_calibration
from mimkd_ray.cache.config import check_rules
from mimkd_ray.cache.key import (
    LOGITS,
    Entry,
    Origin,
    calibration_url,
    key_of,
    logits_entry,
    parts_of,
    pixels_entry,
    publish_key,
)
from mimkd_ray.cache.manifest import Error, ViewManifest, committed, views_there
from mimkd_ray.cache.pixels import PIXELS, ROW_BYTES, pixel_rows
from mimkd_ray.cache.writer import block_rows, write_shard
from mimkd_ray.data.batches import Key, LaneBatch
from mimkd_ray.data.blocks import Blocks
from mimkd_ray.data.dataset import Data, open_data
from mimkd_ray.data.prepare_units import Done
from mimkd_ray.data.views import make_pipeline
from mimkd_ray.errors import DamagedDataError, UserError
from mimkd_ray.models.taps import find_shapes
from mimkd_ray.train.build import build_network, place, teacher_autocast, teacher_plan
from mimkd_ray.train.cached import origin_of
from mimkd_ray.train.calibrate import Sight, fit
from mimkd_ray.train.coding import Coding, by_label, tap_entries
from mimkd_ray.train.config import Config
from mimkd_ray.train.teacher import Teacher

WRITERS = 2
"""Units that are being written while the next one is computed."""


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
Runner = Callable[[Sequence[Unit], str], Iterator[tuple[int, Done]]]
"""Does the units, in any order and anywhere, and yields (number of the unit, what it did). The text says what is
going on."""


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
    """What a build is about: data, network, entries, and the parts of their keys. The same for driver and builders."""

    def __init__(self, config: Config, device: torch.device, data: Data | None = None) -> None:
        """Raises UserError for a config that nothing can be cached for."""
        if not config.cache.root:
            raise UserError(
                "cache.root is not set: give the folder or URL of the cache, --cache.root s3://bucket/cache"
            )
        if not config.data.views:
            raise UserError("data.views is 0: give the number of views to cache, such as --data.views 8")
        if config.teacher.train:
            raise UserError(
                "teacher.train is true: train it first (jobs/ with this command line), and then pass --teacher.train "
                "false and --teacher.weights RUN/teacher/student.safetensors"
            )
        self.config, self.device = config, device
        self.data = data or open_data(config.data)
        self.network: nn.Module = build_network(config, self.data.num_classes, config.teacher.weights)
        self.origin: Origin = origin_of(config, self.data, self.network, device)
        plan = teacher_plan(config, self.network, self.data.num_classes)
        vectors, maps = plan.teacher_taps()
        shapes = dict(plan.teacher_shapes)
        for text in config.cache.taps:
            tap, _, kind = text.partition(":")
            if kind not in ("", "map", "vector"):
                raise UserError(f"cache.taps {text!r}: give LAYER, LAYER:map or LAYER:vector")
            shapes |= find_shapes(self.network, config.data.image_size, [tap])
            as_map = kind == "map" or (not kind and shapes[tap].kind != "vector")
            if as_map and shapes[tap].kind == "vector":
                raise UserError(f"cache.taps {text!r}: the layer returns a vector, not a map")
            (maps if as_map else vectors).append(tap)
        self.vectors, self.maps, self.shapes = tuple(dict.fromkeys(vectors)), tuple(dict.fromkeys(maps)), shapes
        self.entries: list[Entry] = [
            *tap_entries(shapes, self.vectors, self.maps, config.cache),
            logits_entry(self.data.num_classes),
            pixels_entry(ROW_BYTES),
        ]
        check_rules(config.cache, [entry.tap for entry in self.entries])
        self.fitted = [entry for entry in self.entries if needs_calibration(entry.spec, entry.shape)]
        self.fitted = [entry for entry in self.fitted if entry.label != PIXELS]
        self.shards = shards_of(self.data.train.blocks, config.cache.shard_rows)

    def calibration_url(self, entry: Entry) -> str:
        """Where the numbers of an entry's codec are."""
        return calibration_url(self.config.cache.root, entry, self.origin, self.config.cache.calibration_rows)

    def calibrations(self) -> dict[str, bytes | None]:
        """The calibrations that are there, and None for those that are not, by label."""
        return {entry.label: calibration.read(self.calibration_url(entry)) for entry in self.fitted}

    def parts(self, calibrations: Mapping[str, bytes | None]) -> dict[str, dict[str, Any]]:
        """The parts of all keys by label."""
        digests = {label: calibration.digest(value) for label, value in calibrations.items() if value is not None}
        return {e.label: parts_of(e, self.origin, digests.get(e.label, "")) for e in self.entries}

    def row_bytes(self, entry: Entry) -> int:
        """Bytes of a row of an entry."""
        coded = coded_shape(entry.spec, entry.shape)
        return coded.channels * coded.locations * DTYPES[entry.spec.kind].itemsize

    def teacher(self, coding: Coding | None) -> Teacher:
        """The teacher with the taps of all entries."""
        model = place(self.network, self.config.train, self.device)
        autocast = teacher_autocast(self.config, self.device)
        return Teacher(model, self.shapes, self.vectors, self.maps, autocast, coding)

    def sight(self, teacher: Teacher) -> Sight:
        """The training set as this teacher sees it."""
        pipeline = make_pipeline(self.config.data.pipeline, self.config.data.image_size)
        return Sight(self.config, self.data, pipeline, teacher, self.device)


class Builder:
    """Does units. One lives in each process that builds, and keeps the teacher on its device."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.root = setup, setup.config.cache.root
        self._sight: Sight | None = None

    def run(self, units: Sequence[Unit]) -> Iterator[tuple[int, Done]]:
        """Do the units one after the other: the next one is decoded and the last ones are written meanwhile."""
        for number, unit in enumerate(units):
            if isinstance(unit, CalibrationUnit):
                yield number, self._calibrate(unit)
        shards = [(number, unit) for number, unit in enumerate(units) if isinstance(unit, ShardUnit)]
        if shards:
            yield from self._make(shards)

    def _calibrate(self, unit: CalibrationUnit) -> Done:
        teacher = self.setup.teacher(None)
        entries = [entry for entry in self.setup.fitted if entry.label in unit.labels]
        with torch.inference_mode():
            for label, data in fit(self.setup.sight(teacher), entries).items():
                url = self.setup.calibration_url(next(entry for entry in entries if entry.label == label))
                calibration.publish(url, data)
        teacher.tapped.release()
        return Done(unit.rows, 0)

    def _open(self) -> tuple[Sight, dict[str, str]]:
        """The teacher with its codecs, once they are fitted, and the keys by label."""
        if self._sight is None:
            setup = self.setup
            found = setup.calibrations()
            urls = {entry.label: setup.calibration_url(entry) for entry in setup.fitted}
            numbers = {label: calibration.from_bytes(data, urls[label]) for label, data in found.items() if data}
            coded = [entry for entry in setup.entries if entry.label != PIXELS]
            self._sight = setup.sight(setup.teacher(Coding(coded, numbers, setup.device, torch.float32)))
            self._keys = {label: key_of(parts) for label, parts in setup.parts(found).items()}
        return self._sight, self._keys

    def _make(self, units: Sequence[tuple[int, ShardUnit]]) -> Iterator[tuple[int, Done]]:
        sight, keys = self._open()
        size = self.setup.config.cache.batch
        wanted = [
            Key(place, number, np.arange(first, min(first + size, unit.first + unit.rows)), unit.view)
            for place, (_, unit) in enumerate(units)
            for number, first in enumerate(range(unit.first, unit.first + unit.rows, size))
        ]
        written: deque[tuple[int, Future[Done]]] = deque()
        with torch.inference_mode(), ThreadPoolExecutor(WRITERS) as pool:
            unit = _Unit(sight, units[0][1])
            at = 0
            for batch in sight.batches(wanted):
                if batch.step != at:
                    written.append((units[at][0], pool.submit(unit.write, self.root, keys)))
                    at = batch.step
                    unit = _Unit(sight, units[at][1])
                unit.add(batch)
                while written and (written[0][1].done() or len(written) > WRITERS):
                    number, future = written.popleft()
                    yield number, future.result()
            written.append((units[at][0], pool.submit(unit.write, self.root, keys)))
            for number, future in written:
                yield number, future.result()


class _Unit:
    """The features of one unit while they are computed."""

    def __init__(self, sight: Sight, unit: ShardUnit) -> None:
        assert sight.teacher.coding is not None
        self.sight, self.unit, self.coding = sight, unit, sight.teacher.coding
        self.ids: list[Tensor] = []
        self.damaged: list[Tensor] = []
        self.rows: dict[str, list[Tensor]] = {label: [] for label in unit.labels}
        self.errors: dict[str, list[Tensor]] = {label: [] for label in unit.labels}
        self.pending: dict[str, Tensor] = {}

    def add(self, batch: LaneBatch) -> None:
        """Compute the features of a batch."""
        pixels, features = self.sight.look(batch)
        damaged_B = batch.labels_B < 0
        named = by_label(features)
        rows: dict[str, Tensor] = {}
        for label in self.unit.labels:
            if label == PIXELS:
                rows[label] = torch.from_numpy(pixel_rows(pixels))
                continue
            # Taps come through their codec; the logits are stored as they are.
            coded = self.coding.codecs[LOGITS].apply(named[label]) if label == LOGITS else named[label]
            codec = self.coding.codecs[label]
            rows[label] = codec.pack(coded).masked_fill(damaged_B[:, None], 0)
            lost_B = (codec.decode(rows[label]) - coded).flatten(1).square().sum(1)
            sums_2B = torch.stack([lost_B, coded.flatten(1).square().sum(1)])
            self.errors[label].append(sums_2B.masked_fill(damaged_B, 0))
        self._collect()
        self.pending = rows
        self.ids.append(batch.ids_B)
        self.damaged.append(damaged_B)

    def _collect(self) -> None:
        """Bring the rows of the batch before this one to the host: by now they are computed, and nothing waits."""
        for label, value in self.pending.items():
            self.rows[label].append(value.cpu())
        self.pending = {}

    def write(self, root: str, keys: Mapping[str, str]) -> Done:
        """Write and commit. Raises UserError for features that are not finite."""
        self._collect()
        unit = self.unit
        ids = torch.cat(self.ids).cpu()
        damaged = ids[torch.cat(self.damaged).cpu()].tolist()
        size = 0
        for label in unit.labels:
            error = Error(0.0, 0.0, 0.0) if label == PIXELS else self._error(label, ids)
            rows = torch.cat(self.rows[label]).numpy()
            record = write_shard(
                root, keys[label], unit.view, unit.first, ids.numpy(), rows, unit.counts, damaged, error
            )
            size += record.bytes
        return Done(unit.rows, size)

    def _error(self, label: str, ids: Tensor) -> Error:
        lost_B, norm_B = torch.cat(self.errors[label], dim=1).double().cpu()
        if not bool(torch.isfinite(lost_B).all()):
            bad = ids[~torch.isfinite(lost_B)].tolist()
            kind = self.coding.entries[label].spec
            raise UserError(
                f"{label}: {len(bad)} of {len(ids)} images, such as {bad[0]}, have features that are not finite as "
                f"{kind}: store them as bf16 or fp32 (--cache.codecs), or check the teacher's weights and "
                "--cache.precision"
            )
        mean = float(norm_B.mean()) or 1.0
        worst = float((lost_B / mean).max().sqrt())
        return Error(*(float(f"{value:.6g}") for value in (float(lost_B.sum()), float(norm_B.sum()), worst)))


def in_process(setup: Setup) -> Runner:
    """A `Runner` that does everything here."""
    builder = Builder(setup)

    def run(units: Sequence[Unit], title: str) -> Iterator[tuple[int, Done]]:
        return builder.run(units)

    return run


@dataclass(frozen=True)
class Built:
    """A finished cache."""

    keys: dict[str, str]
    """By label."""
    rows: int
    views: int
    bytes: int
    """Of all features of these keys and views."""
    damaged: int


def build(setup: Setup, run: Runner) -> Built:
    """Make what is missing of the cache that ``setup`` describes. Killed at any moment and started again, it goes on.

    The device of ``setup`` must be of the builders' kind. Raises UserError, DamagedDataError for
    more damaged images than ``data.max_damaged`` allows, StorageError.
    """
    config = setup.config
    root, views = config.cache.root, config.data.views
    unfitted = tuple(label for label, data in setup.calibrations().items() if data is None)
    if unfitted:
        sample = CalibrationUnit(unfitted, config.cache.calibration_rows)
        for _ in run([sample], f"fitting the codecs of {', '.join(unfitted)}"):
            pass
    found = setup.calibrations()
    lacking = [label for label, data in found.items() if data is None]
    if lacking:
        raise UserError(
            f"the calibrations of {', '.join(lacking)} are not to be seen in {root}: on several nodes the cache must "
            "be in a folder or at a URL that all of them see, such as s3://bucket/cache"
        )
    keys = {label: publish_key(root, parts) for label, parts in setup.parts(found).items()}
    finished = {label: views_there(root, key) for label, key in keys.items()}
    units: list[ShardUnit] = []
    for view in range(views):
        units += _missing(root, setup, {label: keys[label] for label in keys if view not in finished[label]}, view)
    left = [sum(unit.view == view for unit in units) for view in range(views)]
    published = set()

    def publish(view: int) -> None:
        published.add(view)
        for label, key in keys.items():
            if view not in finished[label]:
                _publish(root, setup, key, label, view)

    for view in range(views):
        if not left[view]:
            publish(view)
    if units:
        whole = len(setup.shards) * views
        done = set()
        for number, _ in run(units, f"caching features ({len(units):,} of {whole:,} units to do)"):
            if number in done:
                continue  # Ray had a task done again whose process died
            done.add(number)
            view = units[number].view
            left[view] -= 1
            if not left[view]:
                publish(view)
    assert len(published) == views, f"{len(published)} of {views} views were published"
    return _summary(root, keys, config)


def _missing(root: str, setup: Setup, keys: Mapping[str, str], view: int) -> list[ShardUnit]:
    """The units of a view that lack some of these labels."""
    if not keys:
        return []
    done = {label: committed(root, key, view) for label, key in keys.items()}
    units = []
    for first, counts in setup.shards:
        labels = tuple(label for label in keys if (first, sum(counts)) not in done[label])
        if labels:
            units.append(ShardUnit(view, first, counts, labels))
    return units


def _publish(root: str, setup: Setup, key: str, label: str, view: int) -> None:
    if storage.exists(manifest.manifest_url(root, key, view)):
        return  # another builder was first, and what it did not choose may be gone already
    records = committed(root, key, view)
    wanted = [(first, sum(counts)) for first, counts in setup.shards]
    lacking = [place for place in wanted if place not in records]
    if lacking:
        raise UserError(
            f"{len(lacking)} of {len(wanted)} shards of {label}, view {view}, are not to be seen in {root}: on several "
            "nodes the cache must be in a folder or at a URL that all of them see, such as s3://bucket/cache; if "
            "they do, somebody removed files: give the command again"
        )
    entry = next(entry for entry in setup.entries if entry.label == label)
    made = ViewManifest(
        key=key, view=view, row_bytes=setup.row_bytes(entry), shards=tuple(records[place] for place in wanted)
    )
    limit = setup.config.data.max_damaged
    if len(made.damaged) > limit * made.rows:
        raise DamagedDataError(
            f"{len(made.damaged):,} of {made.rows:,} images cannot be decoded, more than the allowed share of "
            f"{limit:g}, such as image {int(made.damaged[0])}; repair the data, or allow more with --data.max-damaged"
        )
    manifest.publish(root, made)


def _summary(root: str, keys: Mapping[str, str], config: Config) -> Built:
    size = rows = damaged = 0
    for label, key in keys.items():
        for view in range(config.data.views):
            made = manifest.read_manifest(root, key, view)
            assert made is not None, f"the manifest of {label}, view {view}, was published and is gone"
            size, rows, damaged = size + made.bytes, made.rows, len(made.damaged)
    return Built(dict(keys), rows, config.data.views, size, damaged)
