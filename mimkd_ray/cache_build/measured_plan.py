"""The plan of a cache, from a few batches of teacher, student and loader on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from mimkd_ray.cache_build.build_setup import Setup
from mimkd_ray.data.loading.loader import resolve_loader_workers
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
"""Times that teacher and student are timed on a batch of a lane, after one that is not; and batches that each loader
process is timed for."""


def measured_plan(setup: Setup) -> Plan:
    """Measure and plan. Reads BATCHES + 2 batches of images for each loader process, and writes nothing."""
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
    # Of each process a first batch, BATCHES that are timed, and a last: on a GPU a batch arrives when the next is made.
    processes = max(1, resolve_loader_workers(config.data.loader_workers, setup.data.whole))
    keys = sample_keys(setup.data.whole.num_rows, size * processes * (BATCHES + 2), 0, size)
    batches = sight.batches(keys)
    first = next(batches)
    arrived = [(time.perf_counter(), len(first)), *((time.perf_counter(), len(batch)) for batch in batches)]
    began, ended = (processes * count - 1 for count in (1, BATCHES + 1))
    load = (arrived[ended][0] - arrived[began][0]) / sum(images for _, images in arrived[began + 1 : ended + 1])
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
    return Measured(of_teacher, of_student, load)


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
