"""The records and the manifest that count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from feature_sets import KEY, features, ids, write_shards, write_view

from mimkd_ray.errors import DamagedDataError
from mimkd_ray.teacher_cache.feature_manifest import (
    Error,
    ViewManifest,
    committed,
    publish,
    read_manifest,
    record_url,
    views_there,
)
from mimkd_ray.teacher_cache.writer import write_shard


def manifest_path(root: Path) -> Path:
    return root / KEY / "view-00000.manifest.json"


def test_a_manifest_reads_as_it_was_written(tmp_path: Path) -> None:
    made = write_view(tmp_path)
    read = read_manifest(str(tmp_path), KEY, 0)
    assert read == made
    assert read.rows == 64
    assert read.blocks.counts.tolist() == [16, 16, 5, 16, 11]
    assert [read.locate(block)[1] for block in range(5)] == [b for shard in made.shards for b in shard.blocks]
    assert read.locate(3)[0] is read.shards[1]
    assert read_manifest(str(tmp_path), KEY, 1) is None
    assert views_there(str(tmp_path), KEY) == {0}
    assert views_there(str(tmp_path), "other") == set()


def test_the_first_manifest_counts(tmp_path: Path) -> None:
    """A second builder, whose arithmetic was another one, changes nothing for readers."""
    made = write_view(tmp_path)
    other = write_shard(str(tmp_path), KEY, 0, 0, ids()[:37], features(view=9)[:37], (16, 16, 5), (), Error(0, 1, 0))
    assert other.file != made.shards[0].file
    theirs = ViewManifest(key=KEY, view=0, row_bytes=40, shards=(other, made.shards[1]))
    assert not publish(str(tmp_path), theirs)
    assert read_manifest(str(tmp_path), KEY, 0) == made
    both = committed(str(tmp_path), KEY, 0)
    assert both[0, 37].file == min(other.file, made.shards[0].file), "of two records the first by name"
    assert set(both) == {(0, 37), (37, 27)}


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_record_that_is_damaged_counts_for_nothing(tmp_path: Path, damage: str) -> None:
    first, second = write_shards(tmp_path)
    path = Path(record_url(str(tmp_path), KEY, 0, first.file))
    path.write_bytes({"cut": path.read_bytes()[:-20], "empty": b"", "other": b"[1, 2]"}[damage])
    assert committed(str(tmp_path), KEY, 0) == {(37, 27): second}


def edited(root: Path, change: str) -> None:
    path = manifest_path(root)
    value = json.loads(path.read_text())
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-30])
        return
    if change == "shard":
        value["shards"][0][7] = [7]  # a damaged image that is none
    if change == "other":
        value = {"a": 1}
    if change == "format":
        value["format"] = 99
    if change == "view":
        value["view"] = 3
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cut", "the manifest is wrong"),
        ("shard", "its list of shards has changed since it was written"),
        ("format", "it is of format 99"),
        ("other", "the manifest is wrong: it has no 'format'"),
        ("view", "and view 3"),
    ],
)
def test_a_manifest_that_is_damaged(tmp_path: Path, change: str, message: str) -> None:
    write_view(tmp_path)
    edited(tmp_path, change)
    with pytest.raises(DamagedDataError, match=f"{message}.*give the build command again"):
        read_manifest(str(tmp_path), KEY, 0)


def test_shards_must_cover_all_positions(tmp_path: Path) -> None:
    first, second = write_shards(tmp_path)
    for shards in ((second,), (second, first), (first, first), (first._replace(rows=36), second)):
        with pytest.raises(ValueError, match="expected from"):
            ViewManifest(key=KEY, view=0, row_bytes=40, shards=shards)
    with pytest.raises(ValueError, match="too short for their rows"):
        ViewManifest(key=KEY, view=0, row_bytes=41, shards=(first, second))
    with pytest.raises(ValueError, match="do not fit its 10 bytes"):
        ViewManifest(key=KEY, view=0, row_bytes=40, shards=(first._replace(bytes=10), second))


def test_errors_add_up() -> None:
    assert Error(4.0, 100.0, 0.5).relative == 0.2
    assert Error(0.0, 0.0, 0.0).relative == 0.0
