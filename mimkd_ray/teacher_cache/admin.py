"""Maintenance of caches: listing, verification, and removal of unused objects."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mimkd_ray import storage
from mimkd_ray.errors import DamagedDataError, UserError, count
from mimkd_ray.teacher_cache import calibration
from mimkd_ray.teacher_cache.feature_manifest import (
    Record,
    ViewManifest,
    manifest_url,
    read_manifest,
    record_url,
    view_url,
    views_there,
)
from mimkd_ray.teacher_cache.keys import CALIBRATIONS, LOGITS, THREADS, read_keys

# The names of what a build writes below a cache's root.
_VIEW = re.compile(r"view-\d{5,}")
_FEATURES = re.compile(r"\d{10,}-\d{10,}-[0-9a-f]{16}\.(parquet|json)")
_CALIBRATION = re.compile(r"[0-9a-f]{24}\.safetensors")
_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]+\.tmp")
"""Of local files (local_files.py)."""


def check_root(root: str) -> None:
    """Raise UserError if there is no such place."""
    if not root or not storage.exists(root):
        raise UserError(f"--cache.root '{root}' does not exist; give the folder or URL of a cache")
    if not storage.is_remote(root) and not storage.local_path(root).is_dir():
        raise UserError(f"--cache.root '{root}' is a file; give the folder that holds the caches")


def ls(root: str) -> Iterator[str]:
    """Yield a line for each cached tap: key, tap, codec, views, rows, size, storage error, age, and its origin.

    Reads every manifest.
    """
    check_root(root)
    total = 0
    bad: list[str] = []
    for key, parts in sorted(
        read_keys(root, bad).items(), key=lambda item: (str(item[1]["data"]), str(item[1]["tap"]))
    ):
        manifests = _manifests(root, key)
        size = sum(m.bytes for m in manifests)
        total += size
        rows = manifests[0].rows if manifests else 0
        lost = max((m.error.relative for m in manifests), default=0.0)
        of_teacher = "teacher" in parts  # pixels are stored exactly and belong to no teacher
        kind = parts["codec"] if parts["kind"] == LOGITS else f"{parts['kind']}, {parts['codec']}"
        what = f"{parts['tap']} ({kind})" if of_teacher else parts["tap"]
        error = f"relative error {lost:.2g}, " if of_teacher else ""
        made = f"{parts['teacher']}, weights {parts['weights'][:8]}, {parts['precision']}; " if of_teacher else ""
        age = _days(storage.join(root, key, "key.json"))
        yield (
            f"{key}  {what}: {count(len(manifests), 'view')} of {count(rows, 'image')}, {size / 1e6:,.1f} MB, "
            f"{error}{age}; {made}pipeline {parts['pipeline']} at {parts['image_size']} pixels, "
            f"view seed {parts['view_seed']}, data {parts['data'][:16]}"
        )
    yield from bad
    yield f"{total / 1e6:,.1f} MB in all that manifests list"


def _manifests(root: str, key: str) -> list[ViewManifest]:
    views = sorted(views_there(root, key))
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda view: read_manifest(root, key, view), views)
    return [manifest for manifest in found if manifest is not None]


def _days(url: str) -> str:
    hours = max(0.0, time.time() - storage.modified(url)) / 3600
    return f"{hours:.0f} hours old" if hours < 48 else f"{hours / 24:.0f} days old"


@dataclass
class Verified:
    """Counts of a verification."""

    objects: int = 0
    bytes: int = 0
    damaged: int = 0


def verify(root: str, mend: bool, found: Verified) -> Iterator[str]:
    """Read every object that a manifest lists and compare its sha256; yield a line for each damaged one.

    With `mend` these are removed, and the manifests that list them, so that a build makes them anew. Adds to the counts
    in `found`.
    """
    check_root(root)
    unreadable: list[str] = []
    keys = sorted(read_keys(root, unreadable))
    yield from unreadable
    found.damaged += len(unreadable)
    for key in keys:
        for view in sorted(views_there(root, key)):
            try:
                manifest = read_manifest(root, key, view)
            except DamagedDataError as error:
                found.damaged += 1
                yield str(error)
                if mend:
                    storage.remove_tree(manifest_url(root, key, view))
                continue
            if manifest is None:
                continue
            with ThreadPoolExecutor(THREADS) as pool:
                problems = list(pool.map(lambda shard, m=manifest: _problem(root, m, shard), manifest.shards))
            bad = [(shard, text) for shard, text in zip(manifest.shards, problems, strict=True) if text]
            found.objects += len(manifest.shards)
            found.bytes += manifest.bytes
            found.damaged += len(bad)
            for shard, text in bad:
                url = storage.join(view_url(root, key, view), shard.file)
                yield f"{url} {text}{'; removed' if mend else ''}"
                if mend:
                    storage.remove_tree(record_url(root, key, view, shard.file))
                    storage.remove_tree(url)
            if bad and mend:
                storage.remove_tree(manifest_url(root, key, view))  # last: until then it is found damaged again


def _problem(root: str, manifest: ViewManifest, shard: Record) -> str:
    try:
        data = storage.read_bytes(storage.join(view_url(root, manifest.key, manifest.view), shard.file))
    except FileNotFoundError:
        return "is gone"
    if len(data) != shard.bytes:
        return f"has {len(data):,} bytes, and its manifest says {shard.bytes:,}"
    found = hashlib.sha256(data).hexdigest()
    if found == shard.sha256:
        return ""
    view = memoryview(data)
    for number, block in enumerate(shard.blocks):
        if hashlib.sha256(view[block.offset : block.offset + block.length]).hexdigest() != block.sha256:
            return f"is damaged: the sha256 of row group {number} is not the one in its manifest"
    return "is damaged: the sha256 of its row groups is right, and that of the whole file is not"


def gc(root: str, hours: float, delete: bool) -> Iterator[str]:
    """Yield a line for each object that no manifest lists, and remove it with `delete`.

    In a finished view these are all objects except its manifest's files. Objects of unfinished views may belong to a
    build in progress and are removed only if they are `hours` old. Files with names that no build writes stay.
    """
    check_root(root)
    keys = read_keys(root)
    used = {str(parts["calibration"]) for parts in keys.values()}
    garbage: list[tuple[str, int]] = []
    for key in sorted(keys):
        finished = views_there(root, key)
        for url, size in storage.list_sizes(storage.join(root, key)).items():
            if _TEMPORARY.fullmatch(_name(url)) and _old(url, hours):
                garbage.append((url, size))  # a writer was killed in the middle
        for folder in storage.list_dirs(storage.join(root, key)):
            if not _VIEW.fullmatch(_name(folder)):
                continue
            view = int(folder.rpartition("-")[2])
            manifest = read_manifest(root, key, view) if view in finished else None
            listed = {shard.file for shard in manifest.shards} if manifest else set()
            listed |= {file.removesuffix(".parquet") + ".json" for file in listed}
            for url, size in storage.list_sizes(folder).items():
                written = _FEATURES.fullmatch(_name(url)) or _TEMPORARY.fullmatch(_name(url))
                if written and _name(url) not in listed and (manifest or _old(url, hours)):
                    garbage.append((url, size))
    for url, size in storage.list_sizes(storage.join(root, CALIBRATIONS)).items():
        if _TEMPORARY.fullmatch(_name(url)) and _old(url, hours):
            garbage.append((url, size))
        if not _CALIBRATION.fullmatch(_name(url)):
            continue
        data = calibration.read(url)
        if data is not None and calibration.digest(data) not in used and _old(url, hours):
            garbage.append((url, size))
    for url, size in garbage:
        if delete:
            storage.remove_tree(url)
        yield f"{'removed' if delete else 'not needed'}: {url} ({size:,} bytes)"
    total = sum(size for _, size in garbage)
    hint = "" if delete or not garbage else "; --delete true removes them"
    yield f"{len(garbage):,} objects, {total / 1e6:,.1f} MB that no manifest lists{hint}"


def _name(url: str) -> str:
    return url.rpartition("/")[2]


def _old(url: str, hours: float) -> bool:
    try:
        return time.time() - storage.modified(url) > 3600 * hours
    except FileNotFoundError:  # a writer at work has renamed it
        return False
