"""Negatives from the cache: the right vectors, the same ones whoever draws, and what they do to the loss."""

from __future__ import annotations

import errno
import os
import time
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cached_teacher import walk
from tiny_cache import CPU, build_here, cached_config

from mimkd_ray import local_files
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.data.sources.source import SubsetSource
from mimkd_ray.data.store.block_store import BlockStore
from mimkd_ray.errors import DamagedDataError, UserError
from mimkd_ray.losses.features import Features
from mimkd_ray.teacher_cache.feature_manifest import read_manifest
from mimkd_ray.teacher_cache.feature_reader import FeatureReader
from mimkd_ray.teacher_cache.mapped_vectors import open_column
from mimkd_ray.train.from_cache.cached_negatives import CachedNegatives


def negatives_config(root: Path, count: int = 30, **loss: Any) -> Any:
    return cached_config(
        root / "cache",
        data={"store": str(root / "store")},
        cache={"negatives": count, "canary": 0.0},
        loss={"negatives": "cache", "global_weight": 0.1, "local_weight": 0.1, "kd_weight": 0.0} | loss,
    )


def make(root: Path) -> tuple[Any, FeatureReader]:
    config = negatives_config(root)
    built = build_here(config)
    keys = {label: built.keys[label] for label in ("pool:vector", "stage3:map")}
    return config, FeatureReader(config.cache.root, keys, 60, BlockStore(root / "store"))


def test_a_draw_is_rows_of_the_cache(tmp_path: Path) -> None:
    config, reader = make(tmp_path)
    reader.store = None  # --data.store-gb 0
    negatives = CachedNegatives(config, reader)
    assert list((tmp_path / "store" / "columns").glob("*.npy")), "where --data.store says"
    rows, ids_M, labels_M = negatives.draw(3, 1, CPU)
    assert list(rows) == ["pool:vector"]
    assert len(ids_M) == 30
    stored = open_data(config.data).train.read(range(60))
    positions = np.array([next(p for p, row in enumerate(stored) if row.id == i) for i in ids_M.tolist()])
    found = reader.read(0, positions, ids_M.numpy())["pool:vector"]
    np.testing.assert_array_equal(rows["pool:vector"].numpy(), found)
    assert labels_M.tolist() == [-1] * 30
    train = SubsetSource(open_data(config.data).train, np.arange(5, 60))  # a draw may have images that are not in it
    labels = CachedNegatives(config, reader, train).draw(3, 1, CPU)[2].tolist()
    of_id = {row.id: row.label for row in stored[5:]}
    assert labels == [of_id.get(i, -1) for i in ids_M.tolist()]
    assert len(set(labels)) > 2


def test_draws_are_keyed(tmp_path: Path) -> None:
    config, reader = make(tmp_path)
    first, second = CachedNegatives(config, reader), CachedNegatives(config, reader)
    drawn = {(step, lane): first.draw(step, lane, CPU)[1].tolist() for step in range(3) for lane in range(2)}
    assert {place: second.draw(*place, CPU)[1].tolist() for place in reversed(drawn)} == drawn
    assert len({tuple(ids) for ids in drawn.values()}) == 6
    assert len({i for ids in drawn.values() for i in ids}) > 55, "from all over the set"


def test_a_column_is_collected_once_and_verified(tmp_path: Path) -> None:
    config, reader = make(tmp_path)
    manifest = read_manifest(config.cache.root, reader.keys["pool:vector"], 0)
    column = open_column(config.cache.root, manifest, tmp_path / "here")
    assert column.rows_NB.shape == (60, manifest.row_bytes)
    files = {path: path.stat().st_ino for path in (tmp_path / "here").rglob("*.npy")}
    assert len(files) == 2
    for path in files:
        os.utime(path, (0, time.time() - 29 * 86400))
    (lock,) = path.parent.glob("*.lock")
    for name, days in {"a.rows.npy": 31, "a.lock": 31, ".a.rows.npy.1-ab.tmp": 2, lock.name: 29}.items():
        path.with_name(name).touch()
        os.utime(path.with_name(name), (0, time.time() - days * 86400))
    open_column(config.cache.root, manifest, tmp_path / "here")
    assert {left.name for left in path.parent.iterdir()} == {lock.name, *(file.name for file in files)}
    assert time.time() - lock.stat().st_mtime < 3600
    assert {path: path.stat().st_ino for path in files} == files
    assert all(time.time() - path.stat().st_mtime < 3600 for path in files), "in use again"
    (path, *_) = (tmp_path / "cache" / manifest.key / "view-00000").glob("*.parquet")
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedDataError, match="is damaged"):
        open_column(config.cache.root, manifest, tmp_path / "elsewhere")
    assert not list((tmp_path / "elsewhere").rglob("*.tmp"))


def test_a_column_that_finds_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, reader = make(tmp_path)
    manifest = read_manifest(config.cache.root, reader.keys["pool:vector"], 0)
    store = tmp_path / "here"
    (store / "columns").mkdir(parents=True, mode=0o700)
    left = store / "columns" / f".{manifest.key}-00000-{manifest.shards[0].sha256[:8]}.rows.npy.1-ab.tmp"
    left.write_bytes(b"of a process that was killed")
    store.chmod(0o777)
    with pytest.raises(UserError, match="can be written by others"):
        open_column(config.cache.root, manifest, store)
    store.chmod(0o700)

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local_files.os, "fsync", full)
    with pytest.raises(UserError, match="no space is left"):
        open_column(config.cache.root, manifest, store)
    assert [path.name for path in (store / "columns").iterdir()] == [f"{left.name[1:].partition('.')[0]}.lock"]


def test_they_reach_the_loss(tmp_path: Path) -> None:
    """Terms of vectors score against lane and draw together: the ceiling of InfoNCE is the log of their number."""
    build_here(negatives_config(tmp_path))
    plain = walk(negatives_config(tmp_path, negatives="all"), tmp_path / "a")
    more = walk(negatives_config(tmp_path), tmp_path / "b")
    assert more["samples"] == plain["samples"]
    features: Features = more["features"][0]
    assert features.others.vectors["pool"].shape == (30, features.vectors["pool"].shape[1])
    assert plain["features"][0].others is None
    for kind in ("global/pool-pool", "local/pool-stage3"):
        few, many = (float(seen["log"][f"{kind}/ceiling"]) for seen in (plain, more))
        assert few == pytest.approx(log(10))
        assert log(32) < many <= log(40), "some of the draw are images of the lane"
    assert more["log"]["feature/stage3-stage3/ceiling"] == plain["log"]["feature/stage3-stage3/ceiling"]
    assert torch.isfinite(more["gradient"]).all()
    assert walk(negatives_config(tmp_path), tmp_path / "c")["losses"] == more["losses"]


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss\.negatives is cache, and the run reads none"):
        cached_config(tmp_path, cache={"live": True}, loss={"negatives": "cache"})
    config, reader = make(tmp_path)
    reader.used = ("stage3:map",)
    with pytest.raises(UserError, match="no term reads a teacher's vector"):
        CachedNegatives(config, reader)
