"""Official archives: the same images and labels as with torchvision, and errors that name what is wrong."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
from image_sets import encode, pixels
from official_archives import KIT, add, write_train, write_val

from mimkd_ray import storage
from mimkd_ray.data.prepare.archives import DEVKIT, TRAIN, VAL, open_archives
from mimkd_ray.data.prepare.input_pieces import Origin
from mimkd_ray.errors import UserError

WNIDS = ("n01440764", "n01443537", "n02999410", "n15075141")


def folders(root: Path) -> Path:
    """Class folders of both splits, with classes of different sizes."""
    for split, first, rows in (("train", 0, (5, 3, 7, 4)), ("val", 500, (9, 8, 10, 9))):
        for c, (wnid, count) in enumerate(zip(WNIDS, rows, strict=True)):
            for i in range(count):
                path = root / split / wnid / f"{wnid}_{i}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode(pixels(first + 20 * c + i), "JPEG"))
    return root


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = folders(tmp_path_factory.mktemp("folders"))
    out = tmp_path_factory.mktemp("archives")
    write_train(source / "train", out)
    write_val(source / "val", out, list(WNIDS))
    return out


def content(origin: Origin) -> list[tuple[int, str, bytes]]:
    """(label, file name, image), sorted."""
    samples = [sample for piece in origin.pieces for sample in piece.samples()]
    return sorted((sample.label, sample.name.rpartition("/")[2], sample.image) for sample in samples)


def test_images_and_labels_are_those_of_torchvision(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import ImageFolder, imagenet

    root = tmp_path / "torchvision"
    shutil.copytree(archives, root)
    monkeypatch.setattr(imagenet, "_verify_archive", lambda root, file, md5: None)  # ours are not the real ones
    imagenet.parse_devkit_archive(str(root))
    imagenet.parse_train_archive(str(root))
    imagenet.parse_val_archive(str(root))
    for split in ("train", "val"):
        theirs = ImageFolder(root / split)
        rows = sorted((label, Path(path).name, Path(path).read_bytes()) for path, label in theirs.samples)
        ours = open_archives(str(archives), split)
        assert ours is not None
        assert ours.classes == tuple(theirs.classes) == WNIDS
        assert content(ours) == rows
        assert len({image for _, _, image in rows}) == len(rows)
    assert open_archives(str(archives), "test") is None


def test_pieces_of_train_are_whole_classes_and_of_val_have_their_labels_known(archives: Path) -> None:
    train, val = (open_archives(str(archives), split) for split in ("train", "validation"))
    assert train is not None
    assert val is not None
    assert train.labels is None
    assert [{s.label for s in piece.samples()} for piece in train.pieces] == [{0}, {1}, {2}, {3}]
    assert [[s.name for s in piece.samples()] for piece in train.pieces][1] == [
        f"n01443537/n01443537_{i}.JPEG" for i in range(3)
    ]
    assert val.labels is not None
    assert len(val.pieces) == 3, "36 rows in pieces of 16"
    for piece, labels in zip(val.pieces, val.labels, strict=True):
        assert [sample.label for sample in piece.samples()] == labels.tolist()
        assert sum(len(sample.image) for sample in piece.samples()) == piece.bytes


def test_archives_on_an_object_store(bucket: str, archives: Path) -> None:
    for file in archives.iterdir():
        storage.upload(file, storage.join(bucket, file.name))
    for split in ("train", "val"):
        here, there = open_archives(str(archives), split), open_archives(bucket, split)
        assert here is not None
        assert there is not None
        assert there.digest == here.digest
        assert content(there) == content(here)


def damaged(archives: Path, out: Path, name: str, change: object = None) -> str:
    """A copy of the archives without `name`, or with its end cut off."""
    shutil.copytree(archives, out)
    if change is None:
        (out / name).unlink()
    else:
        (out / name).write_bytes((archives / name).read_bytes()[:change])
    return str(out)


def test_without_the_development_kit_validation_says_so(archives: Path, tmp_path: Path) -> None:
    root = damaged(archives, tmp_path / "set", DEVKIT)
    assert open_archives(root, "train") is not None
    with pytest.raises(UserError, match=rf"{VAL} has no labels: put {DEVKIT}"):
        open_archives(root, "val")


@pytest.mark.parametrize(("name", "split"), [(TRAIN, "train"), (VAL, "val"), (DEVKIT, "val")])
@pytest.mark.parametrize("keep", [0, 300, -12_000])
def test_an_archive_that_is_cut_short_is_named(
    archives: Path, tmp_path: Path, name: str, split: str, keep: int
) -> None:
    if name == DEVKIT and keep < 0:
        keep = -100
    root = damaged(archives, tmp_path / "set", name, keep)
    with pytest.raises(UserError, match=name) as caught:
        open_archives(root, split)
    assert "download" in str(caught.value)


def test_labels_that_do_not_fit_the_images_are_refused(archives: Path, tmp_path: Path) -> None:
    shutil.copytree(archives, tmp_path / "set")
    with tarfile.open(tmp_path / "set" / VAL, "w") as tar:
        add(tar, "ILSVRC2012_val_00000001.JPEG", b"image")
        add(tar, "readme.txt", b"no image")
    with pytest.raises(UserError, match=rf"holds 1 images, and .*{KIT}\.tar\.gz has labels for 36"):
        open_archives(str(tmp_path / "set"), "val")


def test_another_tar_under_the_name_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / TRAIN, "w") as tar:
        add(tar, "cat/1.jpg", b"image")
    with pytest.raises(UserError, match="holds no class tar"):
        open_archives(str(tmp_path), "train")


def test_an_empty_class_tar_is_refused_when_it_is_read(tmp_path: Path) -> None:
    folders(tmp_path / "folders")
    for file in (tmp_path / "folders" / "train" / WNIDS[2]).iterdir():
        file.unlink()
    write_train(tmp_path / "folders" / "train", tmp_path)
    origin = open_archives(str(tmp_path), "train")
    assert origin is not None
    with pytest.raises(UserError, match=rf"{WNIDS[2]}\.tar holds no image"):
        origin.pieces[2].samples()
