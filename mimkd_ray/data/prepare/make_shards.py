"""Preparation of a data set: shards of equal blocks, shuffled once so that every block holds all classes evenly.

`prepare` lists the source, cuts it into pieces, and has two kinds of units run by a `Runner` (Ray Data on all nodes, or
this process): pieces become parts, parts become shards (work_units.py). Then it writes the manifest and removes the
parts. Committed units are not repeated, so a run that was killed resumes, and its result has the same bytes as an
uninterrupted one.

    TARGET/<split>-00000-of-00012.parquet   the shards
    TARGET/<split>.damaged.json             [name, reason] of every image that was left out
    TARGET/<split>.manifest.json            written last
    TARGET/.prepare-<split>/                parts and sidecars, during preparation
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from mimkd_ray import storage
from mimkd_ray.config import PrepareConfig
from mimkd_ray.data.prepare.archives import ARCHIVES, open_archives
from mimkd_ray.data.prepare.input_pieces import THREADS, Origin, open_folders, open_parquet
from mimkd_ray.data.prepare.shuffle_plan import plan_shards, row_keys
from mimkd_ray.data.prepare.web_tars import open_tars
from mimkd_ray.data.prepare.work_units import (
    Done,
    Index,
    PartUnit,
    ShardUnit,
    not_shared,
)
from mimkd_ray.data.sources.folders import class_folders
from mimkd_ray.data.sources.shard_manifest import Manifest, Shard, content_digest, read_manifest, write_manifest
from mimkd_ray.data.sources.splits import Splits, is_of_split
from mimkd_ray.data.sources.tars import expanded
from mimkd_ray.errors import UserError
from mimkd_ray.json_files import parse
from mimkd_ray.places import check_lasting
from mimkd_ray.run_lock import LOCK, held

SETTINGS = "settings.json"


class NoSplitError(UserError):
    """The source has no such split."""


Unit = PartUnit | ShardUnit
Runner = Callable[[Sequence[Unit], str], Iterator[Done]]
"""Runs the units, in any order and on any node, and yields the result of each. The text names the stage for
progress."""


def in_process(units: Sequence[Unit], title: str) -> Iterator[Done]:
    """Run the units in this process, one after the other; a `Runner`."""
    return (unit() for unit in units)


def prepare(config: PrepareConfig, run: Runner = in_process) -> Manifest:
    """Make the prepared split and return its manifest; for a finished split, return its existing manifest.

    Raises UserError for bad input (before any work), for a target that was begun with other settings, and for a full
    disk; DamagedDataError for files that cannot be read; StorageError.
    """
    config = replace(config, source=storage.absolute(config.source), target=storage.absolute(config.target))
    check_lasting("--target", config.target)
    work = storage.join(config.target, f".prepare-{config.split}")
    finished = _finished(config)
    if finished is not None:
        storage.remove_tree(work)  # an earlier run may have been killed before this
        return finished
    if not config.source.endswith(".tar") and not storage.exists(config.source):
        raise UserError(f"--source {config.source} does not exist; give a folder or a URL such as s3://bucket/imagenet")
    origin = open_origin(config)
    _begun(config, origin, work)  # bad input leaves nothing behind, not even a lock
    with held(work, otherwise="--target"):
        return _finished(config) or _prepare(config, origin, work, run)


def _prepare(config: PrepareConfig, origin: Origin, work: str, run: Runner) -> Manifest:
    settings = _begun(config, origin, work)
    if not settings:
        settings = _settings(config, origin)
        storage.write_bytes(storage.join(work, SETTINGS), json.dumps(settings, indent=1).encode())
    indices = _make_parts(config, origin, work, run)
    damaged = [entry for index in indices for entry in index.damaged]
    if not any(index.keys for index in indices):
        raise UserError(
            f"--source {config.source}: none of the {len(damaged):,} images of split '{config.split}' can be decoded"
            + (f"; the first is {damaged[0][0]}: {damaged[0][1]}" if damaged else "")
        )
    shards = tuple(_make_shards(config, origin, indices, work, run))
    text = json.dumps(damaged, indent=1, ensure_ascii=False)
    storage.write_bytes(storage.join(config.target, f"{config.split}.damaged.json"), text.encode("utf-8", "replace"))
    manifest = Manifest(
        split=config.split,
        rows=sum(shard.rows for shard in shards),
        block_rows=config.block_rows,
        classes=origin.classes,
        digest=content_digest(origin.classes, shards),
        damaged=len(damaged),
        settings=settings,
        shards=shards,
    )
    write_manifest(config.target, manifest)
    storage.remove_tree(work)
    return manifest


def _finished(config: PrepareConfig) -> Manifest | None:
    """Return the manifest of a finished split and check its settings against these; the source may be gone by now."""
    manifest = read_manifest(config.target, config.split)
    if manifest is not None:
        tars = expanded(config.source) if config.source.endswith(".tar") else [config.source]
        origin = open_origin(config) if any(map(storage.exists, tars)) else None
        # A set that was finished before these settings were there stays what it is.
        later = [name for name in ("max_pixels", "exif") if name not in manifest.settings]
        wanted = {name: value for name, value in _settings(config, origin).items() if name not in later}
        _compare(config, manifest.settings, wanted, "holds")
    return manifest


def _begun(config: PrepareConfig, origin: Origin, work: str) -> dict[str, Any]:
    """Return the settings that the split was begun with, {} if it was not. Raises UserError if they differ from these,
    for other files of the split, and for a disk without room."""
    url = storage.join(work, SETTINGS)
    begun: dict[str, Any] = {}
    if storage.exists(url):
        begun = parse(storage.read_bytes(url), url, remedy=f"remove {work} and start anew")
        _compare(config, begun, _settings(config, origin), "was begun with")
    else:
        _refuse_strangers(config)
    _check_space(config, origin, work)
    return begun


def open_origin(config: PrepareConfig) -> Origin:
    """Find the split in the source and cut it into pieces: archives, or where training finds it (splits.py).

    Lists files and reads footers, label columns and headers, but no image. Raises UserError for an unknown layout.
    """
    source, split = config.source, config.split
    archives = None if source.endswith(".tar") else open_archives(source, split)
    if archives is not None:
        return archives
    splits = Splits(source)
    found = splits.find(split)
    if found is not None and found.parquet:
        return _of_parquet(config, {url: entry.size for url, entry in found.parquet.items()})
    if found is not None and found.tars:
        return open_tars(found.tars)
    if found is not None:
        # The classes of a set are those of its training images: others may lack some.
        classes = tuple(class_folders(storage.join(source, "train"))) if split != "train" else ()
        return open_folders(found.folder, classes or None)
    raise NoSplitError(
        f"--source {source} has no split '{split}': expected {split}-*.parquet (here or in data/), {split}-*.tar, "
        f"class folders {split}/<class>/<image>, or the official archive {ARCHIVES.get(split, 'of ImageNet')}; found "
        f"{splits.found() or 'nothing'}; name it with --split"
    )


def _of_parquet(config: PrepareConfig, files: dict[str, int]) -> Origin:
    def training() -> tuple[str, ...] | None:
        try:
            return open_origin(replace(config, split="train")).classes
        except NoSplitError:
            return None

    wanted = (config.image_column, config.label_column)
    return open_parquet(files, *wanted, training=None if config.split == "train" else training)


def _settings(config: PrepareConfig, origin: Origin | None) -> dict[str, Any]:
    """Return the settings that determine the bytes of the result, and the source."""
    return {
        "source": config.source,
        **({"source_digest": origin.digest} if origin else {}),
        "seed": config.seed,
        "block_rows": config.block_rows,
        "shard_rows": config.shard_rows,
        "short_side": config.short_side,
        "quality": config.quality if config.short_side else 0,
        "max_pixels": config.max_pixels,
        "exif": "applied" if config.short_side else "kept",
    }


def _compare(config: PrepareConfig, old: dict[str, Any], new: dict[str, Any], verb: str) -> None:
    """Raise UserError if the settings differ from those of the target. The source may move, but its content may not
    change."""
    differing = [
        f"{name} {old.get(name)} (now {value})"
        for name, value in new.items()
        if name != "source" and old.get(name) != value
    ]
    if differing:
        raise UserError(
            f"--target {config.target}: split '{config.split}' {verb} {', '.join(differing)}; use the same "
            "settings and source, another --target, or remove that split there (its files and "
            f".prepare-{config.split})"
        )


def _refuse_strangers(config: PrepareConfig) -> None:
    strangers = [url for url in storage.list_files(config.target, ".parquet") if is_of_split(url, config.split)]
    if strangers:
        raise UserError(
            f"--target {config.target} holds {len(strangers)} Parquet file(s) of split '{config.split}' from "
            f"elsewhere, such as {strangers[0].rpartition('/')[2]}; remove them or give another --target"
        )


def _check_space(config: PrepareConfig, origin: Origin, work: str) -> None:
    """Raise UserError for a local target without enough room: parts and shards exist at the same time."""
    if storage.is_remote(config.target):
        return
    there = storage.list_sizes(work) | {
        u: n for u, n in storage.list_sizes(config.target, ".parquet").items() if is_of_split(u, config.split)
    }
    there.pop(storage.join(work, LOCK), None)
    source = sum(piece.bytes for piece in origin.pieces)
    # Shrunk images are mostly less than half as large; the exact size is not known beforehand.
    need = (source if config.short_side else 2 * source) - sum(there.values())
    place = storage.local_path(config.target)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if need > free:
        raise UserError(
            f"--target {config.target} needs about {need / 1e9:,.1f} GB and its disk has {free / 1e9:,.1f} GB free: "
            f"the source's {source / 1e9:,.1f} GB are there twice until the set is finished; make room, or give "
            "another --target"
        )


def _make_parts(config: PrepareConfig, origin: Origin, work: str, run: Runner) -> list[Index]:
    """Have the missing parts made, and return the index of every part."""
    units = [
        PartUnit(number, piece, keys, config.seed, config.short_side, config.quality, work, config.max_pixels)
        for number, (piece, keys) in enumerate(zip(origin.pieces, row_keys(origin, config.seed), strict=True))
    ]
    return _made(run, units, work, work, "checking images", "parts")


def _make_shards(config: PrepareConfig, origin: Origin, indices: list[Index], work: str, run: Runner) -> list[Shard]:
    """Have the missing shards made, and return the description of every shard."""
    units = plan_shards(
        indices=indices,
        split=config.split,
        block_rows=config.block_rows,
        shard_rows=config.shard_rows,
        classes=origin.classes,
        target=config.target,
        work=work,
    )
    return _made(run, units, config.target, work, "writing shards", "shards")


def _made(run: Runner, units: Sequence[Unit], folder: str, work: str, doing: str, what: str) -> list[Any]:
    """Have those units run whose results are not in `folder`, and return all results."""

    def look(which: Sequence[Unit]) -> list[Any]:
        sizes = storage.list_sizes(folder)
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(lambda unit: unit.finished(sizes), which))

    found = look(units)
    missing = [number for number, result in enumerate(found) if result is None]
    if missing:
        lacking = [units[number] for number in missing]
        for _ in run(lacking, f"{doing} ({len(missing):,} of {len(units):,} {what} to do)"):
            pass
        for number, result in zip(missing, look(lacking), strict=True):
            found[number] = result
    lost = found.count(None)
    if lost:
        raise UserError(f"{lost} of {len(units)} {what} are not to be seen: {not_shared(work)}")
    return found
