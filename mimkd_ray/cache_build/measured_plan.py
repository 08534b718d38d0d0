"""The plan of a cache, from a few batches of teacher, student and loader on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from mimkd_ray.cache_build.build_setup import Setup
from mimkd_ray.taps.tap_codecs import Coding
from mimkd_ray.teacher_cache.codec import Calibration, projects
from mimkd_ray.teacher_cache.cost_plan import Measured, Plan, Sized
from mimkd_ray.teacher_cache.keys import Entry
from mimkd_ray.teacher_cache.pixel_digests import PIXELS
from mimkd_ray.train.engine.step import backward_lane
from mimkd_ray.train.from_cache.cached_teacher import entries_of
from mimkd_ray.train.from_cache.fit_codecs import sample_keys
from mimkd_ray.train.networks.build import build_distiller

BATCHES = 3
"""Batches of a lane that are timed, after one that is not."""


def measured_plan(setup: Setup) -> Plan:
    """Measure and plan. Reads BATCHES + 1 batches of images, and writes nothing."""
    config = setup.config
    used = {entry.label for entry in entries_of([setup.planned], setup.network, setup.head.count)}
    sizes = tuple(Sized(e, e.row_bytes, e.label in used) for e in setup.entries)
    vectors = sum(s.row_bytes for s in sizes if s.used and s.entry.kind == "vector")
    rows = setup.data.whole.num_rows
    return Plan(
        root=config.cache.root,
        rows=rows,
        views=config.data.views,
        epochs=config.train.epochs,
        sizes=sizes,
        measured=_measure(setup),
        device=torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else "this CPU",
        column_bytes=vectors * rows if config.loss.resolved_negatives == "cache" else 0,
    )


def _measure(setup: Setup) -> Measured:
    config = setup.config
    # Timing needs the codecs' shapes, not their numbers, which may not have been fitted yet.
    coded = [entry for entry in setup.entries if entry.label != PIXELS]
    coding = Coding(coded, {e.label: _placeholder(e) for e in setup.fitted}, setup.device, torch.float32)
    teacher = setup.teacher(coding)
    sight = setup.sight(teacher)
    size = min(config.train.lane_batch, setup.data.whole.num_rows)
    keys = sample_keys(setup.data.whole.num_rows, size * (BATCHES + 1), 0, size)
    batches = sight.batches(keys)
    first = next(batches)  # starts the loader processes
    began = time.perf_counter()
    last = first
    count = 0
    for last in batches:
        count += len(last)
    load = (time.perf_counter() - began) / max(count, 1)
    images, features = sight.look(first)
    on_device = sight.normalize(images)

    def seconds(call: Callable[[], object]) -> float:
        call()
        _wait(setup.device)
        began = time.perf_counter()
        for _ in range(BATCHES):
            call()
        _wait(setup.device)
        return (time.perf_counter() - began) / (BATCHES * len(first))

    with torch.inference_mode():
        of_teacher = seconds(lambda: teacher.features(on_device))
    distiller = build_distiller(setup.planned, setup.data.train, setup.device)
    given = features if config.loss.uses_teacher else None
    labels = first.labels_B.clamp(min=0)
    of_student = seconds(lambda: backward_lane(distiller, on_device, labels, first.ids_B, given, 1.0, True))
    teacher.tapped.release()
    return Measured(of_teacher, of_student, load if count else 1e-9)


def _placeholder(entry: Entry) -> Calibration:
    channels = entry.shape.channels
    kept = min(entry.spec.pca, channels) if entry.spec.pca else channels
    mean, components = torch.zeros(channels), torch.eye(channels)[:kept]
    low, step = torch.zeros(kept), torch.ones(kept)
    if projects(entry.spec, entry.shape):
        return Calibration(mean, components, low, step, 1.0, 0)
    return Calibration(None, None, low, step, 1.0, 0)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
