"""The work of building a cache, unit by unit.

A unit is a shard of the training set in one view. Whoever does it (Ray Data on all nodes, or this process) decodes and
augments with the loader of training, in loader processes of its own, so pixels travel through no object store; runs the
teacher on batches that begin with the unit, so that a unit done again on a CPU gives the same bytes; encodes on the
device; and writes one file for each entry, each with its commit record.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mimkd_ray.cache_build.build_setup import CalibrationUnit, Runner, Seen, Setup, ShardUnit, Unit
from mimkd_ray.data.loading.batches import DAMAGED, Key, LaneBatch
from mimkd_ray.data.prepare.work_units import Done
from mimkd_ray.errors import UserError
from mimkd_ray.taps.tap_codecs import Coding, by_label
from mimkd_ray.teacher_cache import calibration
from mimkd_ray.teacher_cache.feature_manifest import Error
from mimkd_ray.teacher_cache.keys import key_of
from mimkd_ray.teacher_cache.pixel_digests import PIXELS, pixel_rows
from mimkd_ray.teacher_cache.writer import write_shard
from mimkd_ray.train.from_cache.fit_codecs import Sight, fit

WRITERS = 2
"""Units that are being written while the next one is computed."""


class Builder:
    """Does units. One lives in each process that builds, and keeps the teacher on its device."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.root = setup, setup.config.cache.root
        self._sight: Sight | None = None

    def run(self, units: Sequence[Unit], seen: Seen) -> Iterator[tuple[int, Done]]:
        """Do the units one after the other: the next one is decoded and the last ones are written meanwhile."""
        for number, unit in enumerate(units):
            if isinstance(unit, CalibrationUnit):
                yield number, self._calibrate(unit, partial(seen, number))
        shards = [(number, unit) for number, unit in enumerate(units) if isinstance(unit, ShardUnit)]
        if shards:
            yield from self._make(shards, seen)

    def _calibrate(self, unit: CalibrationUnit, seen: Callable[[int], None]) -> Done:
        teacher = self.setup.teacher(None)
        entries = [entry for entry in self.setup.fitted if entry.label in unit.labels]
        with torch.inference_mode():
            for label, data in fit(self.setup.sight(teacher), entries, seen).items():
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

    def _make(self, units: Sequence[tuple[int, ShardUnit]], seen: Seen) -> Iterator[tuple[int, Done]]:
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
                seen(units[at][0], unit.images)
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
        self.images = 0
        """Images added so far."""
        self.ids: list[Tensor] = []
        self.damaged: list[Tensor] = []
        self.rows: dict[str, list[Tensor]] = {label: [] for label in unit.labels}
        self.errors: dict[str, list[Tensor]] = {label: [] for label in unit.labels}
        self.pending: dict[str, Tensor] = {}

    def add(self, batch: LaneBatch) -> None:
        """Compute the features of a batch."""
        pixels, features = self.sight.look(batch)
        damaged_B = batch.labels_B == DAMAGED
        named = by_label(features)
        rows: dict[str, Tensor] = {}
        for label in self.unit.labels:
            if label == PIXELS:
                rows[label] = torch.from_numpy(pixel_rows(pixels))
                continue
            coded, codec = named[label], self.coding.codecs[label]
            rows[label] = codec.pack(coded).masked_fill(damaged_B[:, None], 0)
            lost_B = (codec.decode(rows[label]) - coded).flatten(1).square().sum(1)
            sums_2B = torch.stack([lost_B, coded.flatten(1).square().sum(1)])
            self.errors[label].append(sums_2B.masked_fill(damaged_B, 0))
        self._collect()
        self.pending = rows
        self.images += len(batch.ids_B)
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
            entry = self.coding.entries[label]
            flag = "--cache.logits" if entry.kind == "logits" else "--cache.codecs"
            raise UserError(
                f"{label}: {len(bad)} of {len(ids)} images, such as {bad[0]}, have features that are not finite as "
                f"{entry.spec}: store them as bf16 or fp32 ({flag}), or check the teacher's weights and "
                "--cache.precision"
            )
        mean = float(norm_B.mean()) or 1.0
        worst = float((lost_B / mean).max().sqrt())
        return Error(*(float(f"{value:.6g}") for value in (float(lost_B.sum()), float(norm_B.sum()), worst)))


def in_process(setup: Setup) -> Runner:
    """A `Runner` that does everything here."""
    return Builder(setup).run
