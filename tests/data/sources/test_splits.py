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
