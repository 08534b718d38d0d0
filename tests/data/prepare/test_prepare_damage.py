"""Preparation with damaged sources, damaged work and bad input: each with its message."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from image_sets import SHARED, images, parquet_set, write_parquet
from prepare_sets import WRITES, Killed, Killer, Writes, config, files, table

from mimkd_ray import local_files, storage
from mimkd_ray.config import PrepareConfig
from mimkd_ray.data.prepare import make_shards as module
from mimkd_ray.data.prepare.make_shards import Unit, in_process, prepare
from mimkd_ray.data.prepare.work_units import Done
from mimkd_ray.errors import DamagedDataError, UserError


def begun(folders: Path, target: Path, units: int) -> tuple[PrepareConfig, Path]:
    job = config(folders, target)
    with pytest.raises(Killed):
        prepare(job, Killer(units))
    return job, target / ".prepare-train"


def test_a_second_start_is_refused_while_the_first_goes_on(folders: Path, undisturbed: Path, tmp_path: Path) -> None:
    job = config(folders, tmp_path / "set")

    def run(units: Sequence[Unit], title: str) -> Iterator[Done]:
        with pytest.raises(UserError, match=r"/\.prepare-train is in use by process .* or pass another --target"):
            prepare(job)
        return in_process(units, title)

    prepare(job, run)
    assert files(tmp_path / "set") == files(undisturbed)
    assert not (tmp_path / "set" / ".prepare-train").exists()


def test_a_flipped_byte_in_a_part_is_found(folders: Path, undisturbed: Path, tmp_path: Path) -> None:
    job, work = begun(folders, tmp_path / "set", 5)
    blob = work / "part-00002.blob"
    data = bytearray(blob.read_bytes())
    for place in (3, 60, len(data) - 1):
        data[place] ^= 1
        blob.write_bytes(data)
        with pytest.raises(DamagedDataError, match=r"part-00002\.blob has changed .* remove .*part-00002\.json"):
            prepare(job)
        data[place] ^= 1
    (work / "part-00002.json").unlink()  # the remedy
    prepare(job)
    assert files(tmp_path / "set") == files(undisturbed)


@pytest.mark.parametrize("name", ["part-00001.blob", "part-00001.json", "shard-00001.json", "../{shard}"])
@pytest.mark.parametrize("keep", [None, 10, -1])
def test_what_is_missing_or_cut_short_is_made_anew(
    folders: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, keep: int | None
) -> None:
    job = config(folders, tmp_path / "set")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", Writes(WRITES - 1, after=False))
        with pytest.raises(Killed):
            prepare(job)  # every part and shard is there, damaged.json and the manifest are not
    path = tmp_path / "set" / ".prepare-train" / name.format(shard="train-00001-of-00005.parquet")
    data = path.read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(data[:keep])
    again = Killer(10**9)
    prepare(job, again)
    assert files(tmp_path / "set") == files(undisturbed)
    assert again.finished == [("PartUnit" if "part-" in name else "ShardUnit", 1)]


def test_damaged_settings_are_named(folders: Path, tmp_path: Path) -> None:
    job, work = begun(folders, tmp_path / "set", 3)
    (work / "settings.json").write_text("{")
    with pytest.raises(DamagedDataError, match=r"settings\.json .*is damaged.* remove .*\.prepare-train and start"):
        prepare(job)


def test_a_full_disk_says_so_and_is_gone_on_from(
    folders: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        real, calls = local_files.publish, []

        def full(path: Path, fill: Any) -> None:
            calls.append(path)
            if len(calls) > 6:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(path, fill)

        patch.setattr(local_files, "publish", full)
        with pytest.raises(UserError, match=r"cannot write .*part-00002\.json: no space is left .*same command again"):
            prepare(config(folders, tmp_path / "set"))
    prepare(config(folders, tmp_path / "set"))
    assert files(tmp_path / "set") == files(undisturbed)


def test_too_little_space_is_refused_before_work(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sum(path.stat().st_size for path in folders.rglob("*.jpg"))
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((2 * source - 1, False), (2 * source, True)):
        monkeypatch.setattr(module.shutil, "disk_usage", lambda place, free=free: usage._replace(free=free))
        if fits:
            prepare(config(folders, tmp_path / "set"))
        else:
            with pytest.raises(UserError, match=r"needs about 0\.0 GB and its disk has 0\.0 GB free"):
                prepare(config(folders, tmp_path / "set"))
            assert not (tmp_path / "set").exists()


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    root = parquet_set(tmp_path / "src")
    path = root / "train-00001-of-00002.parquet"
    data = bytearray(path.read_bytes())
    at = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    data[at : at + 40] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(DamagedDataError, match=r"train-00001-of-00002\.parquet: row groups 0 to 3 cannot be read"):
        prepare(config(root, tmp_path / "set"))


def test_a_file_that_goes_while_it_works_is_named(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders, tmp_path / "src")

    def late(units: Sequence[Unit], title: str) -> Iterator[Done]:
        shutil.rmtree(tmp_path / "src" / "train" / "dög")
        return in_process(units, title)

    with pytest.raises(UserError, match=r"dög_00\.jpg was there when the source was listed, and is gone"):
        prepare(config(tmp_path / "src", tmp_path / "set"), late)


def test_a_target_that_nodes_do_not_share_is_named(folders: Path, tmp_path: Path) -> None:
    def elsewhere(units: Sequence[Unit], title: str) -> Iterator[Done]:
        for unit in units:
            yield replace(unit, work=str(tmp_path / "other node" / unit.work.lstrip("/")))()

    with pytest.raises(UserError, match=r"5 of 5 parts are not to be seen: on several nodes --target must be"):
        prepare(config(folders, tmp_path / "set"), elsewhere)


def test_bad_input_is_refused_before_work(folders: Path, undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "bare" / "train" / "cat" / "a.txt").write_text("no image")
    (tmp_path / "strange").mkdir()
    shutil.copy(next(iter(undisturbed.glob("*.parquet"))), tmp_path / "strange")
    hidden = tmp_path / "hidden" / "train-00000-of-00001.parquet"
    write_parquet(hidden, images(3), [-1, -1, -1], ["a"])
    target = tmp_path / "set"
    for arguments, message in (
        ((tmp_path / "nowhere", target), "nowhere does not exist"),
        ((tmp_path / "empty", target), r"has no split 'train': expected train-\*\.parquet .* found nothing"),
        ((folders, target, {"split": "val"}), r"ILSVRC2012_img_val\.tar; found train/; name it with --split"),
        ((tmp_path / "bare", target), r"none of 1 class folders holds an image .* the first is 'cat'"),
        ((folders, folders / "set"), r"set lies in --source .*; give a place outside it"),
        ((folders, folders), r"lies in --source"),
        ((folders, target, {"short_side": -1}), "--short-side is -1: give 0 or more"),
        ((folders, target, {"block_rows": 0}), "--block-rows is 0: give 1 or more"),
        ((folders, target, {"shard_rows": 30}), "--shard-rows 30 is no multiple of --block-rows 4; 28 is"),
        ((folders, target, {"quality": 100}), "--quality 100: JPEG quality goes from 1 to 95"),
        ((folders, target, {"split": "a/b"}), "--split 'a/b' has a slash"),
        ((folders, tmp_path / "strange"), r"holds 1 Parquet file\(s\) of split 'train' from elsewhere"),
        ((tmp_path / "hidden", target), "labels go from -1 to -1, and 1 classes"),
    ):
        source, place, *more = arguments
        with pytest.raises(UserError, match=message):
            prepare(config(source, place, **(more[0] if more else {})))
        assert not target.exists()
    assert config(folders, Path(f"{folders}2")).target == f"{folders}2", "a neighbour is outside"


def test_a_source_without_a_good_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "src" / "train" / "cat" / "1.jpg"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 1 images of split 'train' can be decoded; .*cat/1\.jpg: empty"):
        prepare(config(tmp_path / "src", tmp_path / "set"))


def test_blocks_that_would_be_too_large_are_refused(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mimkd_ray.data.prepare import shuffle_plan

    monkeypatch.setattr(shuffle_plan, "MAX_BLOCK_BYTES", 2_000)
    with pytest.raises(UserError, match=r"--block-rows 4: a block of images of 0\.0 MB .*; give \d or fewer"):
        prepare(config(folders, tmp_path / "set"))


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared samples")
def test_real_images(tmp_path: Path) -> None:
    manifest = prepare(config(SHARED / "imagenet_samples", tmp_path / "set", block_rows=64, shard_rows=256))
    assert (manifest.rows, manifest.damaged, len(manifest.classes)) == (500, 0, 1000)
    source = pq.read_table(SHARED / "imagenet_samples" / "train-00000-of-00001.parquet").to_pylist()
    key = {(row["image"]["bytes"], row["image"]["path"], row["label"]) for row in source}
    rows = table(tmp_path / "set", manifest)
    assert {(row["image"]["bytes"], row["image"]["path"], row["label"]) for row in rows} == key
