"""Cached features by position, checked by id, for training batches. Runs in loader processes.

A row group is fetched once per node, verified by its sha256 in the manifest, and kept in the block store with the
images; rows are then read from its file, or in place if the cache is on a local disk. Only the entries that a run uses
are requested.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from mimkd_ray import storage
from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.data.store.block_reader import TOUCH_S, BlockReader
from mimkd_ray.data.store.block_store import BlockStore
from mimkd_ray.data.store.local_disk import is_on_local_disk
from mimkd_ray.data.store.stored_block import Identity, StoredBlock
from mimkd_ray.errors import DamagedDataError
from mimkd_ray.teacher_cache.feature_manifest import (
    FeatureBlock,
    Record,
    ViewManifest,
    manifest_url,
    read_manifest,
    view_url,
)

KEPT_MANIFESTS = 16
KEPT_GROUPS = 256
"""Row groups whose place a process caches; each takes at most one file descriptor."""

MEND = "`python jobs/cache_teacher.py verify --cache.root {} --mend true` removes what is damaged; then build it again"


class _Group(NamedTuple):
    """A row group's mapped arrays, and the identity of the file that was verified."""

    ids_N: np.ndarray
    rows_NB: np.ndarray
    key: str
    path: str
    identity: Identity | None
    used: list[float]
    """Time at which the store was last told that the group is in use."""

    def is_sound(self) -> bool:
        """Return whether a file in place is still the same; one in the store is never rewritten."""
        return not self.path or (self.identity is not None and _identity(self.path) == self.identity)


def _identity(path: str) -> Identity | None:
    try:
        return Identity.of(os.stat(path))
    except FileNotFoundError:
        return None


class FeatureReader:
    """The features of one training set. Picklable, and safe to use in forked processes."""

    def __init__(
        self,
        root: str,
        keys: Mapping[str, str],
        rows: int,
        store: BlockStore | None,
        used: Sequence[str] = (),
        kept: np.ndarray | None = None,
    ) -> None:
        """Store the fields; nothing is read yet.

        `keys` maps each entry's label to its key; `rows` is the number of cached rows. `used`: the entries that are
        read with every batch; others are read only by label. `kept`: the rows (sorted) of the training set if it is a
        part of the cached set; positions count within them.
        """
        self.root, self.keys, self.rows, self.store = root, dict(keys), rows, store
        self.distant = storage.is_remote(root) or not is_on_local_disk(storage.local_path(root))
        """Whether row groups are copied to the store, from object storage or a network file system."""
        self.kept = kept
        self.used = tuple(used or self.keys)
        self.bytes_read = 0
        """Bytes that this process has requested from storage, without manifests."""
        self._manifests: OrderedDict[tuple[str, int], ViewManifest] = OrderedDict()
        self._groups: OrderedDict[tuple[str, int, int], _Group] = OrderedDict()

    def __reduce__(self) -> tuple[object, ...]:
        return FeatureReader, (self.root, self.keys, self.rows, self.store, self.used, self.kept)

    def manifest(self, label: str, view: int) -> ViewManifest:
        """Return the manifest of an entry's view, from memory if possible. Raises DamagedDataError if it is gone or
        does not fit."""
        key = self.keys[label]
        found = self._manifests.get((label, view))
        if found is None:
            found = read_manifest(self.root, key, view)
            url = manifest_url(self.root, key, view)
            if found is None:
                raise DamagedDataError(f"{url} is gone: it was there when the cache was opened; build the view again")
            if found.rows != self.rows:
                raise DamagedDataError(f"{url} has {found.rows:,} rows, and the training set {self.rows:,}")
            self._manifests[label, view] = found
            while len(self._manifests) > KEPT_MANIFESTS:
                self._manifests.popitem(last=False)
        return found

    def read(
        self, view: int, positions: Sequence[int] | np.ndarray, ids: np.ndarray, labels: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Return {label: rows (B, row_bytes), uint8} of the images at `positions`, whose ids must be `ids`.

        Raises DamagedDataError if the ids differ, and for features that are missing or damaged.
        """
        rows = positions if self.kept is None else self.kept[positions]
        return {label: self._rows(label, view, rows, ids) for label in labels or self.used}

    def _rows(self, label: str, view: int, positions: Sequence[int] | np.ndarray, ids: np.ndarray) -> np.ndarray:
        manifest = self.manifest(label, view)
        if len(manifest.damaged) and np.isin(ids, manifest.damaged).any():
            culprit = int(ids[np.isin(ids, manifest.damaged)][0])
            raise DamagedDataError(
                f"image {culprit} could not be decoded when its features were cached ({label}, view {view}), and can "
                f"be now: remove {view_url(self.root, manifest.key, view)} and its manifest, and build the view again"
            )
        blocks, insides = manifest.blocks.locate(positions)
        out, found = np.empty((len(blocks), manifest.row_bytes), dtype=np.uint8), np.empty(len(blocks), dtype=np.int64)
        order = np.argsort(blocks, kind="stable")
        ends = [*(np.flatnonzero(np.diff(blocks[order])) + 1).tolist(), len(order)]
        start = 0
        for end in ends:
            places, start = order[start:end], end
            group = self._open(label, manifest, int(blocks[places[0]]))
            rows = insides[places]
            found[places] = group.ids_N[rows]
            out[places] = group.rows_NB[rows]
        if not np.array_equal(found, ids):
            wrong = int(np.flatnonzero(found != ids)[0])
            raise DamagedDataError(
                f"{label}, view {view}: the features at position {int(np.asarray(positions)[wrong]):,} are of image "
                f"{int(found[wrong])}, and the image there is {int(ids[wrong])}: the cache {self.keys[label]} does not "
                "belong to this training set"
            )
        return out

    def fetch(self, view: int, first: int, stop: int) -> bool:
        """Fetch the features of these positions into the store; return whether they are there."""
        if self.store is None:
            return False
        ends = [first, stop - 1] if self.kept is None else self.kept[[first, stop - 1]].tolist()
        for label in self.used:
            manifest = self.manifest(label, view)
            low, high = manifest.blocks.locate(ends)[0].tolist()
            for number in range(low, high + 1):
                record, block = manifest.locate(number)
                if not self.store.fetch(block_key(block), partial(self._load, manifest, record, block), block.length):
                    return False
        return True

    def block_bytes(self, blocks: Blocks) -> int:
        """Return the mean bytes of features in the store that belong to one of the training set's blocks; 0 for a cache
        on a local disk, where they stay."""
        size = sum(self.manifest(label, 0).bytes for label in self.used)
        return size // max(1, blocks.num_blocks) if self.distant else 0

    def _open(self, label: str, manifest: ViewManifest, number: int) -> _Group:
        """Return a row group in place, without a copy. The places of recently used ones are cached."""
        name, now = (label, manifest.view, number), time.monotonic()
        group = self._groups.get(name)
        if group is not None and group.is_sound():
            if self.store is not None and now - group.used[0] > TOUCH_S:
                self.store.touch(group.key)
                group.used[0] = now
            return group
        record, block = manifest.locate(number)
        key, url = block_key(block), feature_url(self.root, manifest, record)
        in_place = self.store is not None and not self.distant
        path = str(storage.local_path(url)) if in_place else ""
        identity = _identity(path) if in_place else None  # read before the group is verified
        data, _ = BlockReader(self.store).row(key, partial(self._load, manifest, record, block), 0, block.length)
        values = np.frombuffer(data, np.uint8, block.rows * manifest.row_bytes, block.values_at)
        ids_N = np.frombuffer(data, np.int64, block.rows, block.ids_at)
        group = _Group(ids_N, values.reshape(block.rows, manifest.row_bytes), key, path, identity, [now])
        if self.store is not None:  # without a store, another cache holds the process's blocks and bounds their memory
            self._groups[name] = group
            while len(self._groups) > KEPT_GROUPS:
                self._groups.popitem(last=False)
        return group

    def _load(self, manifest: ViewManifest, record: Record, block: FeatureBlock) -> StoredBlock:
        """Fetch and verify a row group: a block of a single row. It stays in place if the cache is on a local disk."""
        url = feature_url(self.root, manifest, record)
        self.bytes_read += block.length
        if self.distant or self.store is None:
            return StoredBlock.of([read_verified(self.root, manifest, record, block)], np.zeros(1, dtype=np.int64))
        path = storage.local_path(url)
        # Read before the file: the verified file is this one, or an older one, which will be noticed.
        identity = Identity.of(path.stat()) if path.exists() else None
        read_verified(self.root, manifest, record, block)
        offset, length, label = (np.array([value], dtype=np.int64) for value in (block.offset, block.length, 0))
        return StoredBlock(offset, length, label, path=str(path), identity=identity)


def block_key(block: FeatureBlock) -> str:
    """Return the name of a row group in the store."""
    return f"features {block.sha256}"


def feature_url(root: str, manifest: ViewManifest, record: Record) -> str:
    """Return the URL of a feature file."""
    return storage.join(view_url(root, manifest.key, manifest.view), record.file)


def read_verified(root: str, manifest: ViewManifest, record: Record, block: FeatureBlock) -> bytes:
    """Return the bytes of a row group, with one request, after checking their sha256. Raises DamagedDataError."""
    url = feature_url(root, manifest, record)
    mend = MEND.format(root)
    short = (
        f"{url} is cut short: it does not hold the {block.length:,} bytes at byte {block.offset:,} that its manifest "
        f"lists; {mend}"
    )
    try:
        data = storage.read_range(url, block.offset, block.length)
    except FileNotFoundError as error:
        raise DamagedDataError(f"{url} is gone, and its manifest lists it; {mend}") from error
    except storage.StorageError as error:
        if storage.size(url) < block.offset + block.length:
            raise DamagedDataError(short) from error
        raise
    if len(data) < block.length:
        raise DamagedDataError(short)
    found = hashlib.sha256(data).hexdigest()
    if found != block.sha256:
        raise DamagedDataError(
            f"{url} is damaged: the {block.length:,} bytes at byte {block.offset:,} have the sha256 {found[:12]}..., "
            f"and the manifest says {block.sha256[:12]}...; {mend}"
        )
    return data
