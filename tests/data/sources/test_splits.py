"""Training and preparation find the same rows under the name of a split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from image_sets import folder_set, images, tar_set, write_parquet, write_tar

from mimkd_ray.config import DataConfig
from mimkd_ray.config.jobs.prepare import PrepareConfig
from mimkd_ray.data.prepare.make_shards import open_origin
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.data.sources.splits import Splits
from mimkd_ray.errors import UserError


def _folders_beside_tars(root: Path) -> None:
    folder_set(root)
    write_tar(root / "train.tar", {"0.jpg": b"x", "0.cls": b"0"})
    write_tar(root / "val.tar", {"0.jpg": b"x", "0.cls": b"0"})


def _folders_with_tars(root: Path) -> None:
    folder_set(root)
    write_tar(root / "train" / "ant.tar", {"0.jpg": b"x", "0.cls": b"0"})


def _parquet_in_two_places(root: Path) -> None:
    for place in (root / "train-0.parquet", root / "data" / "train-1.parquet", root / "data" / "val-0.parquet"):
        write_parquet(place, images(4), [0, 1, 0, 1])


def _with_the_sets_name_before(root: Path) -> None:
    """As timm/imagenet-1k-wds on the hub has them; the files of `val` are no training images."""
    for name, labels in (("set1k-train-0.tar", "01"), ("set1k-train-1.tar", "10"), ("val-train-like-0.tar", "0")):
        members = {
            f"{at}.{kind}": data
            for at, label in enumerate(labels)
            for kind, data in (("jpg", images(1)[0] or b""), ("cls", label.encode()))
        }
        write_tar(root / name, members)
    (root / "._set1k-train-0.tar").write_bytes(b"\0\5\x16\7" * 1024)  # a Mac leaves such files on other disks


@pytest.mark.parametrize(
    ("write", "rows"),
    [
        (_folders_beside_tars, 12),
        (_folders_with_tars, 12),
        (_parquet_in_two_places, 8),
        (tar_set, 16),
        (_with_the_sets_name_before, 4),
    ],
)
def test_preparation_takes_what_training_takes(tmp_path: Path, write: Callable[[Path], None], rows: int) -> None:
    write(tmp_path / "set")
    origin = open_origin(PrepareConfig(source=str(tmp_path / "set"), target=str(tmp_path / "out"), split="train"))
    train = open_data(DataConfig(root=str(tmp_path / "set"))).train
    assert sum(map(len, origin.labels or ())) == train.num_rows == rows
    assert sorted(label for of_piece in origin.labels or () for label in of_piece) == sorted(train.labels())


def test_what_was_found_is_named(tmp_path: Path) -> None:
    _parquet_in_two_places(tmp_path)
    (tmp_path / "train.zip").write_bytes(b"")
    assert Splits(str(tmp_path)).find("test") is None
    assert Splits(str(tmp_path)).found() == "train-0.parquet, train.zip, train-1.parquet, val-0.parquet, data/"


@pytest.mark.parametrize("place", ["train-1.parquet", "data/train-1.parquet", "train/1.parquet", "train/1.tar"])
def test_files_that_are_links_to_nothing_are_refused(tmp_path: Path, place: str) -> None:
    """As in the cache of the hub after files were removed: the rows would be missing without a word."""
    there = tmp_path / place.replace("1.", "0.")
    there.parent.mkdir(exist_ok=True)
    if place.endswith(".tar"):
        write_tar(there, {"0.jpg": images(1)[0] or b"", "0.cls": b"0"})
    else:
        write_parquet(there, images(4), [0, 1, 0, 1])
    assert Splits(str(tmp_path)).find("train")
    (tmp_path / place).symlink_to(tmp_path / "blobs" / "gone")
    (tmp_path / place).with_name("._other.parquet").symlink_to(tmp_path / "blobs" / "gone")
    with pytest.raises(UserError, match=rf"{place} is a link that leads to nothing \(1 such file\): bring what"):
        Splits(str(tmp_path)).find("train")


def test_a_link_to_nothing_that_the_readme_names_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: some/*.parquet\n---\n")
    write_parquet(tmp_path / "some" / "0.parquet", images(4), [0, 1, 0, 1])
    (tmp_path / "some" / "1.parquet").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"some/1\.parquet is a link that leads to nothing"):
        Splits(str(tmp_path))
