"""The cache as a training run sees it: the codecs that its features go through, and the features themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mimkd_ray import console
from mimkd_ray.config import Config
from mimkd_ray.config.cache import check_rules, parse_rule
from mimkd_ray.data.augment.pipelines import make_pipeline
from mimkd_ray.data.sources.data_set import Data
from mimkd_ray.data.store.block_store import open_store
from mimkd_ray.errors import UserError
from mimkd_ray.taps.tap_codecs import Coding, tap_entries
from mimkd_ray.taps.tapped_model import layer_of
from mimkd_ray.teacher_cache import calibration
from mimkd_ray.teacher_cache.codec import needs_calibration
from mimkd_ray.teacher_cache.feature_manifest import views_there
from mimkd_ray.teacher_cache.feature_reader import FeatureReader
from mimkd_ray.teacher_cache.keys import Entry, Origin, calibration_url, key_of, logits_entry, parts_of, pixels_entry
from mimkd_ray.teacher_cache.pixel_digests import PIXELS, ROW_BYTES
from mimkd_ray.train.distributed import Context, ask_first
from mimkd_ray.train.from_cache.fit_codecs import Sight, fit
from mimkd_ray.train.from_cache.missing_features import Wanted, explain
from mimkd_ray.train.networks.build import PlannedStudent, build_teacher, teacher_taps
from mimkd_ray.train.networks.device_settings import parameter_dtype, teacher_autocast
from mimkd_ray.train.networks.teacher import weights_digest
from mimkd_ray.train.networks.teacher_head import teacher_head
from mimkd_ray.train.networks.teacher_input import resizing, teacher_input


@dataclass(frozen=True)
class Cached:
    """The codecs of a run, and its features where they are read from a cache."""

    coding: Coding
    reader: FeatureReader | None


def origin_of(config: Config, data: Data, network: nn.Module, device: torch.device) -> Origin:
    """Return what the features of this run depend on beside the tap. Hashes the weights: 1 s per GB."""
    autocast = teacher_autocast(config, device)
    seen = teacher_input(config)
    plain = "float64" if parameter_dtype(config.train) == torch.float64 else "float32"
    return Origin(
        teacher=config.teacher.name,
        weights=weights_digest(network),
        precision="bf16" if autocast is not None else plain,
        pipeline=config.data.pipeline,
        image_size=config.data.image_size,
        mean=seen.mean,
        std=seen.std,
        view_seed=config.view_seed,
        data=data.whole.digest,
        exif="apply" if config.data.exif == "apply" and not data.are_arrays else "",
        resized=resizing(config),
    )


def entries_of(planned: Sequence[PlannedStudent], network: nn.Module, classes: int) -> list[Entry]:
    """The entries that the students' losses read: one student, or those of a pack, which share the cache. ``classes``
    are the teacher's. Raises UserError for a codec of no tap."""
    shapes, vectors, maps = teacher_taps(planned)
    cache = planned[0].config.cache
    entries = tap_entries(shapes, vectors, maps, cache)
    # A cache may hold more than this run reads: then any layer may have a codec.
    named = [parse_rule(text)[0].partition(":")[0] for text in cache.codecs if cache.root]
    layers = {path for path, _ in network.named_modules() if path}
    others = [name for name in named if layer_of(name) in layers]
    check_rules(cache, [*(entry.tap for entry in entries), *others])
    with_logits = any(one.loss.uses_logits for one in planned)
    return [*entries, logits_entry(classes, cache.logits)] if with_logits else entries


def parts_of_run(
    entries: Sequence[Entry], origin: Origin, calibrations: Mapping[str, bytes | None]
) -> dict[str, dict[str, Any]]:
    """The key parts of what a run reads, the pixels' too, by label."""
    digests = {label: calibration.digest(value) for label, value in calibrations.items() if value is not None}
    return {e.label: parts_of(e, origin, digests.get(e.label, "")) for e in [*entries, pixels_entry(ROW_BYTES)]}


def open_cached(
    planned: Sequence[PlannedStudent], data: Data, network: nn.Module | None, context: Context, run_dir: str
) -> Cached | None:
    """The codecs and features of a run; None where the config asks for neither. All workers call it together.

    A run with codecs and no cache fits them itself, and keeps the numbers in its directory. The students, where they
    are a pack's, read the same cache. Raises UserError where the cache lacks what is needed, naming what differs.
    """
    config = planned[0].config
    if network is None or not config.cache.codes:
        return None
    entries = entries_of(planned, network, teacher_head(config, data).count)
    origin = origin_of(config, data, network, context.device)
    place = config.cache.root or run_dir
    fitted = [entry for entry in entries if needs_calibration(entry.spec, entry.shape)]
    urls = {entry.label: calibration_url(place, entry, origin, config.cache.calibration_rows) for entry in fitted}
    known = ask_first(lambda: {label: calibration.read(url) for label, url in urls.items()})
    missing = [entry for entry in fitted if known[entry.label] is None]
    if missing and not config.cache.reads:
        # Every worker does the same work: waiting for one of them could outlast a collective's patience.
        teacher = build_teacher(planned, network, context.device)
        pipeline = make_pipeline(config.data.pipeline, config.data.image_size)
        what = f"fitting the codecs of {', '.join(entry.label for entry in missing)}"
        try:
            with console.phase(what, config.cache.calibration_rows, said=False) as advance:
                made = fit(Sight(config, data, pipeline, teacher, context.device), missing, advance)
        finally:
            teacher.tapped.release()
        known |= ask_first(lambda: {label: calibration.publish(urls[label], value) for label, value in made.items()})
    numbers = {label: calibration.from_bytes(value, urls[label]) for label, value in known.items() if value}
    reader = None
    if config.cache.reads:
        parts = parts_of_run(entries, origin, known)
        configs = [one.config for one in planned]
        reader = open_reader(configs, data, parts, [entry.label for entry in missing])
    return Cached(Coding(entries, numbers, context.device, parameter_dtype(config.train)), reader)


def open_reader(
    configs: Sequence[Config],
    data: Data,
    parts: Mapping[str, dict[str, Any]],
    unfitted: Sequence[str],
) -> FeatureReader:
    """The reader of the entries with these key parts. Raises UserError for views that are not there."""
    config = configs[0]
    problem = ask_first(lambda: what_is_missing(configs, parts, unfitted))
    if problem:
        raise UserError(problem)
    keys = {label: key_of(each) for label, each in parts.items()}
    used = [label for label in keys if label != PIXELS]
    store = data.train.store or open_store(config.data)
    return FeatureReader(config.cache.root, keys, data.whole.num_rows, store, used, data.kept)


def what_is_missing(configs: Sequence[Config], parts: Mapping[str, dict[str, Any]], unfitted: Sequence[str]) -> str:
    """Return why the cache does not hold these entries in all views of the run; "" if it does. One listing an entry."""
    root, views = configs[0].cache.root, set(range(configs[0].data.views))
    wanted = [
        Wanted(label, each, sorted(views if label in unfitted else views - views_there(root, key_of(each))))
        for label, each in parts.items()
    ]
    return explain(configs, [w for w in wanted if w.missing])
