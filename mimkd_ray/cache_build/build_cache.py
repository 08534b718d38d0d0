"""Building a cache: which features are missing, having them made unit by unit, and publishing what is complete.

A unit that was done for some entries is done for the others alone. When all units of a view are there, its manifests
are published: readers see nothing before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mimkd_ray import storage
from mimkd_ray.cache_build.build_setup import CalibrationUnit, Runner, Setup, ShardUnit, Unit
from mimkd_ray.config import Config
from mimkd_ray.data.loading.damaged_images import damaged_allowed
from mimkd_ray.data.prepare.unit_progress import Progress
from mimkd_ray.data.prepare.work_units import Done
from mimkd_ray.errors import DamagedDataError, UserError
from mimkd_ray.teacher_cache import feature_manifest
from mimkd_ray.teacher_cache.feature_manifest import ViewManifest, committed, views_there
from mimkd_ray.teacher_cache.keys import publish_key


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


class Images(Progress):
    """Progress in images, those of unfinished units too, with the megabytes written."""

    def __init__(self, title: str, units: Sequence[Unit]) -> None:
        super().__init__(title, sum(unit.rows for unit in units), "images", 1)
        self.written = 0
        self.unfinished: dict[int, int] = {}
        self.finished: set[int] = set()

    def seen(self, number: int, rows: int) -> None:
        """Note how many images of a unit the teacher has seen."""
        with self.lock:
            if number not in self.finished:
                self.unfinished[number] = rows
                self.tell()

    def finish(self, number: int, done: Done) -> None:
        """Count a finished unit."""
        with self.lock:
            self.finished.add(number)
            self.unfinished.pop(number, None)
            self.written += done.bytes
            self.add(Done(done.rows, done.rows))

    def so_far(self) -> tuple[int, int]:
        """Return the images of finished units, and those of others that the teacher has seen."""
        rows = self.rows + sum(self.unfinished.values())
        return rows, rows

    def figures(self) -> str:
        """Return the megabytes written."""
        return f"{self.written / 1e6:,.0f} MB written" if self.written else ""


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
        for _ in _told(f"fitting the codecs of {', '.join(unfitted)}", [sample], run):
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
        for number in _told(f"caching features ({len(units):,} of {whole:,} units to do)", units, run):
            view = units[number].view
            left[view] -= 1
            if not left[view]:
                publish(view)
    assert len(published) == views, f"{len(published)} of {views} views were published"
    return _summary(root, keys, config)


def _told(title: str, units: Sequence[Unit], run: Runner) -> Iterator[int]:
    """Run the units with their progress on the console. Yields the number of each when it is done."""
    with Images(title, units) as progress:
        for number, done in run(units, progress.seen):
            if number not in progress.finished:  # Ray has a task done again whose process died
                progress.finish(number, done)
                yield number


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
    if storage.exists(feature_manifest.manifest_url(root, key, view)):
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
    made = ViewManifest(key=key, view=view, row_bytes=entry.row_bytes, shards=tuple(records[place] for place in wanted))
    limit = setup.config.data.max_damaged
    if len(made.damaged) > damaged_allowed(limit, made.rows):
        raise DamagedDataError(
            f"{len(made.damaged):,} of {made.rows:,} images cannot be decoded, more than the allowed share of "
            f"{limit:g}, such as image {int(made.damaged[0])}; repair the data, or allow more with --data.max-damaged"
        )
    feature_manifest.publish(root, made)


def _summary(root: str, keys: Mapping[str, str], config: Config) -> Built:
    size = rows = damaged = 0
    for label, key in keys.items():
        for view in range(config.data.views):
            made = feature_manifest.read_manifest(root, key, view)
            assert made is not None, f"the manifest of {label}, view {view}, was published and is gone"
            size, rows, damaged = size + made.bytes, made.rows, len(made.damaged)
    return Built(dict(keys), rows, config.data.views, size, damaged)
