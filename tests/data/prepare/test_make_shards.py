"""Preparation of a data set, unit by unit and without Ray: content, balance, sources, images."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_sets import encode, folder_set, images, pixels, write_parquet
from official_archives import write_train
from PIL import Image
from prepare_sets import Killed, Killer, config, files, table

from mimkd_ray import storage
from mimkd_ray.config import DataConfig, PrepareConfig
from mimkd_ray.data.prepare import input_pieces
from mimkd_ray.data.prepare.make_shards import prepare
from mimkd_ray.data.prepare.work_units import checked, class_keys
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.data.sources.shard_manifest import read_manifest, write_manifest
from mimkd_ray.errors import UserError


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
    assert "no JPEG, PNG" in why_second
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


def test_a_folder_that_a_system_made_is_no_class_of_any_split(tmp_path: Path) -> None:
    for name in ("train/cat/a", "train/dog/a", "train/__MACOSX/a", "val/dog/a"):
        path = tmp_path / "raw" / f"{name}.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(encode(pixels(1)))
    made = {split: prepare(config(tmp_path / "raw", tmp_path / "set", split=split)) for split in ("train", "val")}
    assert made["train"].classes == made["val"].classes == ("cat", "dog")
    assert [row["label"] for row in table(tmp_path / "set", made["val"])] == [1]


def test_classes_that_are_text_have_the_numbers_of_training(tmp_path: Path) -> None:
    for split, labels in {"train": ["cat", "dog", "eel"], "val": ["eel", "dog"], "alone": ["eel"]}.items():
        columns = {"image": pa.array([encode(pixels(i)) for i in range(len(labels))]), "label": pa.array(labels)}
        source = tmp_path / ("raw" if split != "alone" else "other")
        source.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), source / f"{split}-0.parquet")
    made = {split: prepare(config(tmp_path / "raw", tmp_path / "set", split=split)) for split in ("train", "val")}
    assert made["train"].classes == made["val"].classes == ("cat", "dog", "eel")
    assert sorted(row["label"] for row in table(tmp_path / "set", made["val"])) == [1, 2]
    assert prepare(config(tmp_path / "other", tmp_path / "set", split="alone")).classes == ("eel",)


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


def test_what_is_shrunk_is_upright_for_good() -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    out = io.BytesIO()
    Image.fromarray(pixels(3, 40, 60)).save(out, "JPEG", exif=tags.tobytes(), quality=95)
    data = out.getvalue()
    with Image.open(io.BytesIO(checked(data, 20, 95))) as shrunk:
        assert shrunk.size == (20, 30)
        assert 0x0112 not in shrunk.getexif()
        stands = np.asarray(Image.fromarray(pixels(3, 40, 60)).transpose(Image.Transpose.ROTATE_270).resize((20, 30)))
        assert np.abs(np.asarray(shrunk).astype(int) - stands).mean() < 6
    assert checked(data, 0, 95) == data  # the tag is kept, for training to apply


def test_images_of_too_many_pixels_are_left_out_and_named(folders: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folders, source)
    (source / "train" / "ant" / "huge.png").write_bytes(encode(pixels(1, 50, 60), "PNG"))
    manifest = prepare(config(source, tmp_path / "set", max_pixels=2999))
    assert manifest.damaged == 3
    damaged = (tmp_path / "set" / "train.damaged.json").read_text()
    assert "ant/huge.png" in damaged
    assert "declares 60 x 50 pixels, more than data.max_pixels 2,999" in damaged
    assert prepare(config(source, tmp_path / "set", max_pixels=2999)) == manifest
    with pytest.raises(UserError, match=r"max_pixels 2999 \(now 3000\)"):
        prepare(config(source, tmp_path / "set", max_pixels=3000))


def test_a_set_of_before_these_settings_is_still_finished(folders: Path, tmp_path: Path) -> None:
    manifest = prepare(config(folders, tmp_path / "set", short_side=9))
    old = {name: value for name, value in manifest.settings.items() if name not in ("exif", "max_pixels")}
    write_manifest(str(tmp_path / "set"), replace(manifest, settings=old))
    assert prepare(config(folders, tmp_path / "set", short_side=9)).settings == old


def test_a_resized_set(folders: Path, tmp_path: Path) -> None:
    manifest = prepare(config(folders, tmp_path / "set", short_side=9))
    for row in table(tmp_path / "set", manifest):
        assert min(Image.open(io.BytesIO(row["image"]["bytes"])).size) == 9
    assert manifest.rows == 65
    assert (manifest.settings["short_side"], manifest.settings["quality"]) == (9, 90)


def test_shards_are_about_a_quarter_of_a_gigabyte_by_default(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mimkd_ray.data.prepare import shuffle_plan

    monkeypatch.setattr(shuffle_plan, "SHARD_BYTES", 9_000)
    manifest = prepare(config(folders, tmp_path / "set", shard_rows=0))
    sizes = [sum(block.length for block in shard.blocks) for shard in manifest.shards]
    assert len(sizes) > 2
    assert all(0.5 < size / 9_000 < 1.5 for size in sizes[:-1])


@pytest.mark.parametrize("groups", [40, 25])
def test_a_large_row_group_is_read_in_parts_and_gives_the_same_shards(
    groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "raw" / "train-0.parquet", images(40), [i % 4 for i in range(40)], row_group=groups)
    whole = prepare(config(tmp_path / "raw", tmp_path / "whole"))
    monkeypatch.setattr(input_pieces, "LARGE_BYTES", 0)
    monkeypatch.setattr(input_pieces, "STREAM_ROWS", 3)
    monkeypatch.setattr(input_pieces, "MIN_PIECE_ROWS", 5)
    pieces = input_pieces.open_parquet(storage.list_sizes(str(tmp_path / "raw"))).pieces
    assert [len(piece.samples()) for piece in pieces] == {40: [5] * 8, 25: [5] * 8}[groups]
    names = [sample.name for piece in pieces for sample in piece.samples()]
    assert len(set(names)) == 40
    parts = prepare(config(tmp_path / "raw", tmp_path / "parts"))
    assert table(tmp_path / "parts", parts) == table(tmp_path / "whole", whole)
