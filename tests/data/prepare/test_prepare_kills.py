"""Preparation killed anywhere and started again, without Ray: nothing lost, nothing twice; and finished sets."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from image_sets import encode, pixels
from prepare_sets import WRITES, Killed, Killer, Writes, config, files

from mimkd_ray import storage
from mimkd_ray.data.prepare.make_shards import Unit, prepare
from mimkd_ray.data.prepare.work_units import Done
from mimkd_ray.data.sources.shard_manifest import read_manifest
from mimkd_ray.errors import UserError


@pytest.mark.parametrize("at", range(10))
def test_killed_between_any_two_units_it_goes_on(folders: Path, undisturbed: Path, tmp_path: Path, at: int) -> None:
    """Five parts and five shards. The target's place is no part of the result."""
    job = config(folders, tmp_path / "set")
    first, second = Killer(at), Killer(10**9)
    with pytest.raises(Killed):
        prepare(job, first)
    assert read_manifest(job.target, "train") is None
    prepare(job, second)
    assert files(tmp_path / "set") == files(undisturbed)
    assert len(first.finished) == at
    assert sorted(first.finished + second.finished) == [
        (kind, number) for kind in ("PartUnit", "ShardUnit") for number in range(5)
    ], "each unit once"


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_write_it_goes_on(
    folders: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    for at in range(1, WRITES + 1):
        target = tmp_path / str(at)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_bytes", Writes(at, after))
            with pytest.raises(Killed):
                prepare(config(folders, target))
        assert (read_manifest(str(target), "train") is not None) == (at == WRITES and after)
        prepare(config(folders, target))
        assert files(target) == files(undisturbed)


def test_a_finished_split_is_left_alone(folders: Path, undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()}

    def never(units: Sequence[Unit], title: str) -> Iterator[Done]:
        raise AssertionError("nothing is to be done")

    manifest = prepare(config(folders, undisturbed), never)
    assert manifest == read_manifest(str(undisturbed), "train")
    assert {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()} == before


def test_a_finished_split_does_not_need_its_source(folders: Path, tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(folders, source)
    first = prepare(config(source, tmp_path / "set"))
    shutil.rmtree(source)
    assert prepare(config(source, tmp_path / "set")) == first
    with pytest.raises(UserError, match=r"holds seed 0 \(now 1\)"):
        prepare(config(source, tmp_path / "set", seed=1))


def test_the_source_may_move_but_not_change(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders, tmp_path / "src")
    with pytest.raises(Killed):
        prepare(config(tmp_path / "src", tmp_path / "set"), Killer(3))
    (tmp_path / "src").rename(tmp_path / "moved")
    job = config(tmp_path / "moved", tmp_path / "set")
    (tmp_path / "moved" / "train" / "ant" / "new.jpg").write_bytes(encode(pixels(1), "JPEG"))
    with pytest.raises(UserError, match=r"split 'train' was begun with source_digest \w+ \(now \w+\); use the same"):
        prepare(job)
    (tmp_path / "moved" / "train" / "ant" / "new.jpg").unlink()
    assert prepare(job).rows == 65


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"seed 0 \(now 1\); use"),
        ({"block_rows": 8}, r"block_rows 4 \(now 8\); use"),
        ({"shard_rows": 0, "short_side": 8}, r"shard_rows 16 \(now 0\), short_side 0 \(now 8\), quality 0 \(now 90\)"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused_with_the_differing_fields(
    folders: Path, undisturbed: Path, tmp_path: Path, change: dict[str, Any], message: str, finished: bool
) -> None:
    target = undisturbed
    if not finished:
        target = tmp_path / "set"
        with pytest.raises(Killed):
            prepare(config(folders, target), Killer(3))
    before = files(target)
    with pytest.raises(UserError, match=message):
        prepare(config(folders, target, **change))
    assert files(target) == before
