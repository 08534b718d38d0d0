from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from image_sets import encode, folder_set, pixels

from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.data.sources.folders import FolderSource
from mimkd_ray.errors import DamagedDataError, UserError


def test_the_same_files_and_labels_as_image_folder(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    folder_set(tmp_path)
    theirs = ImageFolder(str(tmp_path / "train"))
    ours = FolderSource(str(tmp_path / "train"))
    assert ours.classes == tuple(theirs.classes)
    assert ours.num_rows == 12
    rows = ours.read(range(12))
    assert sorted((row.name, row.label) for row in rows) == sorted(theirs.samples)
    assert [row.id for row in rows] == list(range(12))
    assert [row.label for row in rows] == ours.labels().tolist()
    assert all(row.image == Path(row.name).read_bytes() for row in rows)
    assert ours.label_range() == (0, 2)


def test_ids_are_mixed_and_fixed(tmp_path: Path) -> None:
    folder_set(tmp_path, per_class=8)
    source = FolderSource(str(tmp_path / "train"))
    assert source.labels().tolist() != sorted(source.labels().tolist())
    again = pickle.loads(pickle.dumps(FolderSource(str(tmp_path / "train"))))  # noqa: S301
    assert again.read([5, 3]) == source.read([5, 3])
    assert again.digest == source.digest


def test_blocks(tmp_path: Path) -> None:
    data = encode(pixels(0))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(150):
            (tmp_path / name / f"{i}.png").write_bytes(data)
    source = FolderSource(str(tmp_path))
    assert source.blocks == Blocks.uniform(300, 256)
    assert set(np.bincount(source.labels()[:256])) <= set(range(100, 160))
    digest = source.digest
    (tmp_path / "a" / "0.png").unlink()
    assert FolderSource(str(tmp_path)).digest != digest


def test_validation_takes_the_training_classes(tmp_path: Path) -> None:
    folder_set(tmp_path)
    for file in (tmp_path / "val" / "ant").iterdir():
        file.unlink()
    (tmp_path / "val" / "ant").rmdir()
    val = FolderSource(str(tmp_path / "val"), ("ant", "bee", "cat"))
    assert set(val.labels().tolist()) == {1, 2}
    with pytest.raises(UserError, match=r"'bee'.*did you mean 'been'"):
        FolderSource(str(tmp_path / "val"), ("ant", "been", "cat"))


def test_errors(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="expected <class>/<image>"):
        FolderSource(str(tmp_path / "train"))
    folder_set(tmp_path / "set")
    (tmp_path / "set" / "train" / "dog").mkdir()
    with pytest.raises(UserError, match=r"1 of 4 class folders hold no image.*'dog'"):
        FolderSource(str(tmp_path / "set" / "train"))
    source = FolderSource(str(tmp_path / "set" / "val"))
    Path(source.read([0])[0].name).unlink()
    with pytest.raises(DamagedDataError, match=r"set/val.*is gone"):
        source.read([0])
