"""WebDataset tars: prepared and trained from, with other programs' layouts and faults."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from image_sets import folder_set, images, write_tar
from prepare_sets import config, table

from mimkd_ray.config import DataConfig
from mimkd_ray.data.prepare.make_shards import prepare
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.data.sources.tars import expanded
from mimkd_ray.errors import DamagedDataError, UserError


def write_set(root: Path, name: str = "train-{:06d}.tar") -> list[tuple[bytes | None, int]]:
    """Three tars with the images in turn, labels in either form; returns the rows."""
    rows = [(image, number % 3) for number, image in enumerate(images(12))]
    for shard in range(3):
        files: dict[str, bytes] = {}
        for number in range(4 * shard, 4 * shard + 4):
            image, label = rows[number]
            key = f"some.folder/{'x' * 120}/{number:04d}"  # longer than the old header holds
            form = (".cls", str(label).encode()) if number % 2 else (".json", json.dumps({"label": label}).encode())
            files |= {key + form[0]: form[1], f"{key}.JPG": image or b"", f"{key}.txt": b"a caption"}
        write_tar(root / name.format(shard), files)
    return rows


@pytest.mark.parametrize("how", ["folder", "pattern", "split's folder"])
def test_tars_are_prepared(how: str, tmp_path: Path) -> None:
    source = tmp_path / "raw"
    rows = write_set(
        source / "train" if how == "split's folder" else source,
        "shards-{:03d}.tar" if how == "pattern" else "train-{:06d}.tar",
    )
    given = source / "shards-{000..002}.tar" if how == "pattern" else source
    manifest = prepare(config(given, tmp_path / "set"))
    assert prepare(config(given, tmp_path / "set")) == manifest
    (tar, *_) = source.rglob("*.tar")
    whole = tar.read_bytes()
    tar.write_bytes(whole + bytes(512))
    with pytest.raises(UserError, match="holds source_digest"):
        prepare(config(given, tmp_path / "set"))
    for path in source.rglob("*.tar"):
        path.unlink()
    if how == "pattern":
        assert prepare(config(given, tmp_path / "set")) == manifest, "a source may be gone"
    found = table(tmp_path / "set", manifest)
    assert sorted((row["image"]["bytes"], row["label"]) for row in found) == sorted(rows)
    assert manifest.classes == ("0", "1", "2")
    data = open_data(DataConfig(root=str(tmp_path / "set"), val_split="train"))
    assert (data.train.num_rows, data.num_classes) == (12, 3)


def test_samples_of_kinds_that_are_not_read_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {"1.jpg": images(1)[0] or b"", "1.cls": b"0", "1.txt": b"a caption", "2.heic": b"x", "2.cls": b"0"}
    write_tar(tmp_path / "raw" / "train-0.tar", {"1.png": b"an image of the same sample", **files})
    assert prepare(config(tmp_path / "raw", tmp_path / "set")).rows == 1
    assert "passed over: 2 other files (1 .png, 1 .heic), such as 1.png, 2.heic" in caplog.text


def test_patterns() -> None:
    assert expanded("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expanded("{0..1}/x{9..10}.tar") == ["0/x9.tar", "0/x10.tar", "1/x9.tar", "1/x10.tar"]
    assert expanded("a.tar") == ["a.tar"]


def test_training_from_tars_is_training_from_class_folders(tmp_path: Path) -> None:
    """Of the same images in the order of the folders' listing: same ids, labels, blocks and bytes, so the same run."""
    folder_set(tmp_path / "folders")
    for split in ("train", "val"):
        found = sorted((tmp_path / "folders" / split).glob("*/*_*"))
        files: dict[str, bytes] = {}
        for number, path in enumerate(found):
            label = ("ant", "bee", "cat").index(path.parent.name)
            files |= {f"{number:04d}{path.suffix}": path.read_bytes(), f"{number:04d}.cls": str(label).encode()}
        half = 2 * (len(found) // 2)
        for shard, names in enumerate((list(files)[:half], list(files)[half:])):
            write_tar(tmp_path / "tars" / f"{split}-{shard}.tar", {name: files[name] for name in names})
    folders, tars = (open_data(DataConfig(root=str(tmp_path / each))) for each in ("folders", "tars"))
    assert (tars.num_classes, tars.classes) == (3, ("0", "1", "2"))
    for theirs, ours in ((folders.train, tars.train), (folders.val, tars.val)):
        assert ours.blocks == theirs.blocks
        assert ours.labels().tolist() == theirs.labels().tolist()
        rows = pickle.loads(pickle.dumps(ours)).read([7, 0, 11])  # noqa: S301
        assert [row._replace(name="") for row in rows] == [row._replace(name="") for row in theirs.read([7, 0, 11])]
    pattern = open_data(DataConfig(root=f"{tmp_path}/tars/train-{{0..1}}.tar", holdout=0.25))
    assert (pattern.train.num_rows, pattern.val.num_rows) == (9, 3)
    with pytest.raises(UserError, match=r"no validation split .*--data.holdout"):
        open_data(DataConfig(root=f"{tmp_path}/tars/train-{{0..1}}.tar"))
    (tmp_path / "tars" / "train-1.tar").write_bytes(b"")
    with pytest.raises(DamagedDataError, match=r"train-1.tar: the tar was written again"):
        tars.train.read(range(12))


def test_a_tar_that_is_written_again_is_not_trained_on(tmp_path: Path) -> None:
    """Of the same length: the images would be others, under the labels of those that were there."""
    write_tar(tmp_path / "train-0.tar", {"0.jpg": bytes(600), "0.cls": b"0"})
    write_tar(tmp_path / "val-0.tar", {"0.jpg": bytes(600), "0.cls": b"0"})
    train = open_data(DataConfig(root=str(tmp_path))).train
    assert train.read([0])[0].image == bytes(600)
    (tmp_path / "train-0.tar").write_bytes(bytes(1) + (tmp_path / "train-0.tar").read_bytes()[1:])
    with pytest.raises(
        DamagedDataError, match=r"train-0\.tar: the tar was written again .*give the same command again"
    ):
        train.read([0])


def test_labels_of_a_part_of_the_images(tmp_path: Path) -> None:
    files = {f"{number}.jpg": image or b"" for number, image in enumerate(images(5))}
    files |= {"0.cls": b"1", "1.json": b'{"label": 0}', "2.json": b'{"label": "a text"}', "3.json": b"{"}
    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}-0.tar", files)
    with pytest.raises(UserError, match=r"2\.json holds"):
        open_data(DataConfig(root=str(tmp_path)))
    data = open_data(DataConfig(root=str(tmp_path), labels="partial"))
    found = {row.name.rpartition("/")[2]: row.label for row in data.train.read(range(5))}
    assert found == {"0.jpg": 1, "1.jpg": 0, "2.jpg": -1, "3.jpg": -1, "4.jpg": -1}
    assert (data.num_classes, data.judged, data.val.num_rows) == (2, True, 2)


@pytest.mark.parametrize(
    "label", [b'{"label": 123456789}', b'{"label": Infinity}', b'{"cls": 1e999}', b'{"label": 12}']
)
def test_labels_that_nobody_asked_for(label: bytes, tmp_path: Path) -> None:
    files = {f"{number}.jpg": image or b"" for number, image in enumerate(images(3))} | {"0.cls": b"9", "1.cls": b"3"}
    write_tar(tmp_path / "train-0.tar", files)
    write_tar(tmp_path / "val-0.tar", files | {"2.json": label})
    data = open_data(DataConfig(root=str(tmp_path), labels="none", num_classes=10))
    assert (data.judged, sorted(data.val.labels().tolist()), data.train.num_rows) == (True, [3, 9], 3)
    write_tar(tmp_path / "val-0.tar", {"2.jpg": files["2.jpg"], "2.json": label})
    assert not open_data(DataConfig(root=str(tmp_path), labels="none", num_classes=10)).judged
    write_tar(tmp_path / "train-0.tar", {"2.jpg": files["2.jpg"], "2.json": label})
    said = "labels up to 12" if label.endswith(b"12}") else r"2\.json holds .* class number.*: mend it"
    with pytest.raises(UserError, match=said):
        open_data(DataConfig(root=str(tmp_path), num_classes=10))


def test_class_folders_are_read_and_not_the_tar_that_they_came_from(tmp_path: Path) -> None:
    folder_set(tmp_path)
    write_tar(tmp_path / "train.tar", {"ant/1.jpg": b"x"})
    assert open_data(DataConfig(root=str(tmp_path))).classes == ("ant", "bee", "cat")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"1.jpg": b"x"}, "1.jpg and 0 other images have no label"),
        ({"1.jpg": b"x", "1.cls": b"cat"}, "1.cls holds b'cat', and no class number"),
        ({"1.jpg": b"x", "1.json": b"[]"}, "1.jpg and 0 other images have no label"),
        ({"1.jpg": b"x", "1.json": b"{"}, "1.json holds b'{', and no class number"),
        ({"1.jpg": b"x", "1.cls": b"-1"}, "1.jpg and 0 other images have no label"),
        ({"1.npy": b"x"}, "no tar of the split holds an image"),
    ],
)
def test_tars_that_are_no_image_set(files: dict[str, bytes], said: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "raw" / "train-0.tar", files)
    with pytest.raises(UserError, match=said.replace("{", r"\{")):
        prepare(config(tmp_path / "raw", tmp_path / "set"))


def test_tars_that_are_missing_or_cut_short(tmp_path: Path) -> None:
    write_set(tmp_path / "raw")
    with pytest.raises(UserError, match=r"names 5 tars, and 2 of them are not there, such as \S+train-000003\.tar"):
        prepare(config(tmp_path / "raw" / "train-{000000..000004}.tar", tmp_path / "set"))
    whole = tmp_path / "raw" / "train-000001.tar"
    whole.write_bytes(whole.read_bytes()[: 3 * 512 + 100])
    with pytest.raises(UserError, match=r"train-000001\.tar .*(not a whole tar archive|is cut short)"):
        prepare(config(tmp_path / "raw", tmp_path / "set"))
