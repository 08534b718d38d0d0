"""Preparation of a data set, unit by unit and without Ray: content, balance, kills, damage and bad input."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from image_sets import SHARED, encode, folder_set, images, parquet_set, pixels, write_parquet
from official_archives import write_train
from PIL import Image

from mimkd_ray import storage
from mimkd_ray.data import prepare as module
from mimkd_ray.data.dataset import DataConfig, open_data
from mimkd_ray.data.manifest import Manifest, read_manifest
from mimkd_ray.data.prepare import PrepareConfig, Unit, in_process, prepare
from mimkd_ray.data.prepare_units import Done, checked, class_keys
from mimkd_ray.errors import DamagedDataError, UserError


def config(source: Path, target: Path, **more: Any) -> PrepareConfig:
    return PrepareConfig(source=str(source), target=str(target), **{"block_rows": 4, "shard_rows": 16, **more})


def files(root: Path) -> dict[str, bytes]:
    """{path: content} of all below `root`, hidden ones too."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def table(root: Path, manifest: Manifest) -> list[dict[str, Any]]:
    return [row for shard in manifest.shards for row in pq.read_table(root / shard.file).to_pylist()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """67 images in three classes of different sizes, two of them damaged; five parts."""
    root = tmp_path_factory.mktemp("folders")
    for c, (name, count) in enumerate({"ant": 30, "bee": 25, "dög": 12}.items()):
        for i in range(count):
            path = root / "train" / name / f"{name}_{i:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(pixels(100 * c + i), "JPEG"))
    (root / "train" / "bee" / "bee_03.jpg").write_bytes(b"no image")
    whole = (root / "train" / "ant" / "ant_17.jpg").read_bytes()
    (root / "train" / "ant" / "ant_17.jpg").write_bytes(whole[: len(whole) // 2])
    return root


@pytest.fixture(scope="module")
def undisturbed(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("undisturbed") / "set"
    prepare(config(folders, target))
    return target


def test_every_good_image_is_there_once_with_its_label_and_name(folders: Path, undisturbed: Path) -> None:
    manifest = read_manifest(str(undisturbed), "train")
    assert manifest is not None
    rows = table(undisturbed, manifest)
    names = ("ant", "bee", "dög")
    source = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in folders.rglob("*.jpg")}
    for name in ("bee/bee_03.jpg", "ant/ant_17.jpg"):
        del source[name]
    assert {row["image"]["path"]: row["image"]["bytes"] for row in rows} == source
    assert len(rows) == len(source) == manifest.rows == 65
    assert all(names[row["label"]] == row["image"]["path"].partition("/")[0] for row in rows)
    assert [row["id"] for row in rows] == list(range(65))
    assert manifest.classes == names
    assert sorted(files(undisturbed)) == [
        *(f"train-{n:05d}-of-00005.parquet" for n in range(5)),
        "train.damaged.json",
        "train.manifest.json",
    ]
    assert [shard.rows for shard in manifest.shards] == [16, 16, 16, 16, 1]


def test_damaged_images_are_listed_with_their_reason(undisturbed: Path) -> None:
    manifest = read_manifest(str(undisturbed), "train")
    assert manifest is not None
    assert manifest.damaged == 2
    (first, why_first), (second, why_second) = json.loads((undisturbed / "train.damaged.json").read_text())
    assert (first, second) == ("ant/ant_17.jpg", "bee/bee_03.jpg")
    assert "truncated" in why_first.lower()
    assert "cannot identify image file" in why_second
    assert "0x" not in why_second, "an address, which would be another one in every run"


def test_the_manifest_says_what_the_files_are(undisturbed: Path) -> None:
    manifest = read_manifest(str(undisturbed), "train")
    assert manifest is not None
    for shard in manifest.shards:
        data = (undisturbed / shard.file).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        assert [block.offset for block in shard.blocks] == [
            4,
            *(block.offset + block.length for block in shard.blocks[:-1]),
        ]
        assert shard.blocks[-1].offset + shard.blocks[-1].length == footer, "blocks fill what is not footer"
        whole = pq.ParquetFile(io.BytesIO(data))
        for number, block in enumerate(shard.blocks):
            part = data[block.offset : block.offset + block.length]
            assert hashlib.sha256(part).hexdigest() == block.sha256
            # The footer and this range alone, with rubbish elsewhere, give the row group.
            alone = bytes(block.offset) + part + b"\xff" * (footer - block.offset - block.length) + data[footer:]
            rows = pq.ParquetFile(io.BytesIO(alone)).read_row_group(number)
            assert rows.equals(whole.read_row_group(number))
            assert len(rows) == block.rows


def test_the_files_are_plain_parquet_with_statistics_on_numbers_only(undisturbed: Path) -> None:
    for path in undisturbed.glob("*.parquet"):
        metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            columns = {(c := metadata.row_group(group).column(i)).path_in_schema: c for i in range(4)}
            assert list(columns) == ["image.bytes", "image.path", "label", "id"]
            assert {name for name, column in columns.items() if column.is_stats_set} == {"label", "id"}
            for column in columns.values():
                assert column.compression == "UNCOMPRESSED"
                assert "DICTIONARY" not in str(column.encodings)
        assert path.read_bytes().count(b"huggingface") >= 1
        schema = pq.read_schema(path)
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        assert features["label"]["names"] == ["ant", "bee", "dög"]
        assert str(schema.field("image").type) == "struct<bytes: binary, path: string>"


def test_training_reads_it(undisturbed: Path) -> None:
    data = open_data(DataConfig(root=str(undisturbed), val_split="train", window=2))
    assert (data.train.num_rows, data.classes) == (65, ("ant", "bee", "dög"))
    manifest = read_manifest(str(undisturbed), "train")
    assert manifest is not None
    rows = table(undisturbed, manifest)
    assert [(row.label, row.image) for row in data.train.read(range(65))] == [
        (row["label"], row["image"]["bytes"]) for row in rows
    ]


# --- the shuffle


@pytest.mark.parametrize("sizes", [(100,) * 20, (1300, 732, 5, 1, 400), (50,)])
def test_blocks_are_balanced_to_the_stated_bound(sizes: tuple[int, ...]) -> None:
    rows, classes, block = sum(sizes), len(sizes), 32
    bound = np.array([2 + 2 * n * classes / rows for n in sizes])
    for seed in range(20):
        keys = np.concatenate([class_keys(n, seed, label) for label, n in enumerate(sizes)])
        labels = np.repeat(np.arange(classes), sizes)[np.argsort(keys, kind="stable")]
        worst = []
        for start in range(0, rows - block + 1, block):
            counts = np.bincount(labels[start : start + block], minlength=classes)
            expected = block * np.array(sizes) / rows
            assert (np.abs(counts - expected) < bound).all()
            worst.append(np.abs(counts - expected).mean())
        assert np.mean(worst) < 1, "mostly far better than the bound"


def test_keys_are_random_and_one_in_each_interval() -> None:
    keys = class_keys(1000, seed=3, label=7)
    np.testing.assert_array_equal(np.sort(np.floor(keys * 1000)), np.arange(1000))
    assert abs(np.corrcoef(keys, np.arange(1000))[0, 1]) < 0.1
    assert abs(np.corrcoef(keys, class_keys(1000, seed=3, label=8))[0, 1]) < 0.1
    assert abs(np.corrcoef(keys, class_keys(1000, seed=4, label=7))[0, 1]) < 0.1
    np.testing.assert_array_equal(keys, class_keys(1000, seed=3, label=7))


def test_rows_lie_in_the_order_of_their_keys(folders: Path, undisturbed: Path) -> None:
    """The oracle: every class sorted by name, its keys, and one sort of all that is not damaged."""
    keyed = []
    for label, name in enumerate(("ant", "bee", "dög")):
        paths = sorted((folders / "train" / name).iterdir())
        keys = class_keys(len(paths), 0, label)
        keyed += [(key, f"{name}/{path.name}") for key, path in zip(keys, paths, strict=True)]
    bad = {"ant/ant_17.jpg", "bee/bee_03.jpg"}
    expected = [name for _, name in sorted(keyed) if name not in bad]
    manifest = read_manifest(str(undisturbed), "train")
    assert manifest is not None
    assert [row["image"]["path"] for row in table(undisturbed, manifest)] == expected


def test_another_seed_gives_another_order(folders: Path, undisturbed: Path, tmp_path: Path) -> None:
    other = prepare(config(folders, tmp_path / "set", seed=1))
    first = read_manifest(str(undisturbed), "train")
    assert first is not None
    assert other.digest != first.digest
    rows, others = table(undisturbed, first), table(tmp_path / "set", other)
    assert {row["image"]["path"] for row in rows} == {row["image"]["path"] for row in others}
    assert [row["label"] for row in rows] != [row["label"] for row in others]


# --- sources


def test_archives_and_class_folders_give_the_same_bytes(folders: Path, undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "archives").mkdir()
    write_train(folders / "train", tmp_path / "archives")
    manifest = prepare(config(tmp_path / "archives", tmp_path / "set"))
    first = read_manifest(str(undisturbed), "train")
    assert first is not None
    assert manifest.digest == first.digest
    ours, theirs = files(tmp_path / "set"), files(undisturbed)
    for name in ("train.manifest.json",):  # which holds the source
        assert ours.pop(name) != theirs.pop(name)
    assert ours == theirs


@pytest.mark.parametrize("where", ["", "data"])
@pytest.mark.parametrize("plain", [False, True])
def test_hugging_face_parquet(tmp_path: Path, where: str, plain: bool) -> None:
    content = images(37)
    content[5] = None
    content[30] = b"\xff\xd8 broken"
    labels: list[int | None] = [i % 3 for i in range(37)]
    for part, (start, stop) in enumerate([(0, 20), (20, 37)]):
        path = tmp_path / "src" / where / f"train-0000{part}-of-00002.parquet"
        write_parquet(path, content[start:stop], labels[start:stop], ["a", "b", "c"], row_group=6, plain=plain)
    manifest = prepare(config(tmp_path / "src", tmp_path / "set"))
    rows = table(tmp_path / "set", manifest)
    got = sorted((row["image"]["bytes"], row["label"]) for row in rows)
    assert got == sorted((content[i], i % 3) for i in range(37) if i not in (5, 30))
    assert manifest.classes == ("a", "b", "c")
    listed = json.loads((tmp_path / "set" / "train.damaged.json").read_text())
    assert [name for name, _ in listed] == ["train-00000-of-00002.parquet row 5", "train-00001-of-00002.parquet row 10"]
    assert listed[0][1] == "empty"
    # A prepared set is Hugging Face Parquet: it can be prepared again.
    again = prepare(config(tmp_path / "set", tmp_path / "again", seed=5))
    assert again.rows == 35
    assert sorted(row["image"]["path"] for row in table(tmp_path / "again", again)) == sorted(
        row["image"]["path"] for row in rows
    )


def test_a_validation_split_has_the_classes_of_training(tmp_path: Path) -> None:
    root = folder_set(tmp_path / "src")
    shutil.rmtree(root / "val" / "ant")
    for split in ("train", "val"):
        manifest = prepare(config(root, tmp_path / "set", split=split))
        assert manifest.classes == ("ant", "bee", "cat")
    assert {row["label"] for row in table(tmp_path / "set", manifest)} == {1, 2}
    data = open_data(DataConfig(root=str(tmp_path / "set")))
    assert (data.train.num_rows, data.val.num_rows) == (12, 8)


def test_an_object_store_gives_the_same_bytes(bucket: str, folders: Path, undisturbed: Path) -> None:
    for path in sorted(folders.rglob("*.jpg")):
        storage.upload(path, storage.join(bucket, "raw", str(path.relative_to(folders))))
    job = PrepareConfig(source=f"{bucket}/raw", target=f"{bucket}/set", block_rows=4, shard_rows=16)
    with pytest.raises(Killed):
        prepare(job, Killer(8))
    assert storage.exists(f"{bucket}/set/.prepare-train/shard-00002.json")
    prepare(job)
    expected = files(undisturbed)
    assert [url.rpartition("/")[2] for url in storage.list_files(f"{bucket}/set")] == sorted(expected)
    assert not storage.exists(f"{bucket}/set/.prepare-train")
    del expected["train.manifest.json"]
    for name, data in expected.items():
        assert storage.read_bytes(f"{bucket}/set/{name}") == data
    ours, theirs = read_manifest(f"{bucket}/set", "train"), read_manifest(str(undisturbed), "train")
    assert ours is not None
    assert theirs is not None
    assert replace(ours, settings={}) == replace(theirs, settings={})


# --- images


def test_images_are_shrunk_to_the_short_side_as_torchvision_does_it(tmp_path: Path) -> None:
    import torch
    from torchvision.transforms import v2

    for height, width in ((60, 45), (45, 60), (41, 50), (50, 50)):
        big = pixels(3, height, width)
        out = checked(encode(big, "PNG"), 20, 95)
        shrunk = np.asarray(Image.open(io.BytesIO(out)))
        expected = v2.Resize(20, antialias=True)(torch.from_numpy(big.copy()).permute(2, 0, 1)).permute(1, 2, 0).numpy()
        assert shrunk.shape == expected.shape
        through_jpeg = np.asarray(Image.open(io.BytesIO(encode(expected, "JPEG", quality=95))))
        assert np.abs(shrunk.astype(int) - through_jpeg.astype(int)).mean() < 0.5
        assert out.startswith(b"\xff\xd8")
        assert len(checked(encode(big, "PNG"), 20, 50)) < len(out)
        small = encode(big, "PNG")
        assert checked(small, min(height, width), 90) == small
        assert checked(small, 0, 90) == small


def test_a_resized_set(folders: Path, tmp_path: Path) -> None:
    manifest = prepare(config(folders, tmp_path / "set", short_side=9))
    for row in table(tmp_path / "set", manifest):
        assert min(Image.open(io.BytesIO(row["image"]["bytes"])).size) == 9
    assert manifest.rows == 65
    assert (manifest.settings["short_side"], manifest.settings["quality"]) == (9, 90)


def test_shards_are_about_a_quarter_of_a_gigabyte_by_default(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mimkd_ray.data import prepare_plan

    monkeypatch.setattr(prepare_plan, "SHARD_BYTES", 9_000)
    manifest = prepare(config(folders, tmp_path / "set", shard_rows=0))
    sizes = [sum(block.length for block in shard.blocks) for shard in manifest.shards]
    assert len(sizes) > 2
    assert all(0.5 < size / 9_000 < 1.5 for size in sizes[:-1])


# --- kills


class Killed(Exception):
    """Stands for SIGKILL: nothing of ours catches it."""


class Killer:
    """Does units here, and dies before the one with the given number; keeps a list of what it finished."""

    def __init__(self, at: int) -> None:
        self.left, self.finished = at, []

    def __call__(self, units: Sequence[Unit], title: str) -> Iterator[Done]:
        order = list(units)
        random.Random(self.left).shuffle(order)  # nodes finish in any order
        for unit in order:
            if self.left == 0:
                raise Killed
            self.left -= 1
            done = unit()
            self.finished.append((type(unit).__name__, unit.number))
            yield done


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


WRITES = 1 + 10 + 10 + 2  # settings, 5 x (blob, index), 5 x (shard, sidecar), damaged.json, manifest


class Writes:
    """storage.write_bytes that dies at the given write, before it or after it."""

    def __init__(self, at: int, after: bool) -> None:
        self.left, self.after, self.real = at, after, storage.write_bytes

    def __call__(self, url: str, data: bytes) -> None:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise Killed
        self.real(url, data)
        if self.left == 0:
            raise Killed


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


# --- damage and bad input


def begun(folders: Path, target: Path, units: int) -> tuple[PrepareConfig, Path]:
    job = config(folders, target)
    with pytest.raises(Killed):
        prepare(job, Killer(units))
    return job, target / ".prepare-train"


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
    with pytest.raises(DamagedDataError, match=r"settings\.json is damaged .* remove .*\.prepare-train and start anew"):
        prepare(job)


def test_a_full_disk_says_so_and_is_gone_on_from(
    folders: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        real, calls = storage.write_bytes, []

        def full(url: str, data: bytes) -> None:
            calls.append(url)
            if len(calls) > 6:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(url, data)

        patch.setattr(storage, "write_bytes", full)
        with pytest.raises(UserError, match=r"no space is left for .*part-00002\.json \([\d,]+ bytes\).*start again"):
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
        ((tmp_path / "bare", target), r"1 of 1 class folders hold no image .* the first is 'cat'"),
        ((folders, folders / "set"), r"set lies in --source .*; give a place outside it"),
        ((folders, folders), r"lies in --source"),
        ((folders, target, {"short_side": -1}), "--short-side -1: give 1 pixel or more"),
        ((folders, target, {"block_rows": 0}), "--block-rows 0"),
        ((folders, target, {"shard_rows": 30}), "--shard-rows 30 is no multiple of --block-rows 4; 28 is"),
        ((folders, target, {"quality": 100}), "--quality 100: JPEG quality goes from 1 to 95"),
        ((folders, target, {"split": "a/b"}), "--split 'a/b' is no name"),
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
    from mimkd_ray.data import prepare_plan

    monkeypatch.setattr(prepare_plan, "MAX_BLOCK_BYTES", 2_000)
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
