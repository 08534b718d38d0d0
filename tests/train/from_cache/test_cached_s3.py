"""A cache on an S3 server: built, trained from, damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from jobs_here import TAKES_LONG
from test_cached_teacher import walk, worst_difference
from tiny_cache import build_here, cached_config

from mimkd_ray import storage
from mimkd_ray.data.store import block_reader
from mimkd_ray.errors import DamagedDataError
from mimkd_ray.teacher_cache import admin


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_reader, "_blocks", block_reader._KeptBlocks())


@TAKES_LONG
def test_the_same_features_as_from_a_local_cache(bucket: str, tmp_path: Path) -> None:
    here = cached_config(tmp_path / "cache", data={"store": str(tmp_path / "store")})
    there = replace(here, cache=replace(here.cache, root=f"{bucket}/cache"))
    local, remote = build_here(here), build_here(there)
    assert remote.keys == local.keys
    assert remote.bytes == local.bytes
    assert build_here(there) == remote, "finished"
    ours = walk(replace(there, data=replace(there.data, loader_workers=1)), tmp_path / "run")
    theirs = walk(here, tmp_path / "run")
    assert ours["losses"] == theirs["losses"]
    assert worst_difference(ours["features"], theirs["features"]) == 0
    (*lines, total) = admin.ls(f"{bucket}/cache")
    assert len(lines) == len(local.keys)
    assert "0 hours old" in lines[0]
    assert total.endswith("MB in all that manifests list")
    assert list(admin.gc(f"{bucket}/cache", 0.0, True)) == ["0 objects, 0.0 MB that no manifest lists"]


def test_a_truncated_object(bucket: str, tmp_path: Path) -> None:
    data = {"store": str(tmp_path / "store"), "views": 1}
    config = cached_config(f"{bucket}/cache", data=data, cache={"canary": 0.0, "shard_rows": 30})
    built = build_here(config)
    folder = f"{bucket}/cache/{built.keys['stage3:map']}/view-00000"
    urls = storage.list_files(folder, ".parquet")
    for url in urls:
        storage.write_bytes(url, storage.read_bytes(url)[:100])
    with pytest.raises(DamagedDataError, match=r"\.parquet is cut short: .*verify --cache.root s3://.* --mend true"):
        walk(config, tmp_path / "run")
    found = admin.Verified()
    lines = list(admin.verify(f"{bucket}/cache", True, found))
    assert found.damaged == len(lines) == len(urls)
    build_here(config)
    assert not list(admin.verify(f"{bucket}/cache", False, admin.Verified()))
