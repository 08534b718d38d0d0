from __future__ import annotations

import os
import pickle
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from image_sets import encode, folder_set, pixels

from mimkd_ray import storage
from mimkd_ray.config import DataConfig, PrepareConfig
from mimkd_ray.data.augment.decode import decode
from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.data.prepare.input_pieces import open_folders
from mimkd_ray.data.prepare.make_shards import prepare
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.data.sources.folders import FolderSource
from mimkd_ray.data.sources.parquet import ParquetSource
from mimkd_ray.data.store.block_store import BlockStore
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
    source = FolderSource(str(tmp_path / "set" / "val"))
    Path(source.read([0])[0].name).unlink()
    with pytest.raises(DamagedDataError, match=r"set/val.*is gone"):
        source.read([0])


def test_kinds_and_folders_of_a_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kinds = {"tif": "TIFF", "TIFF": "TIFF", "bmp": "BMP", "jfif": "JPEG", "gif": "GIF", "ppm": "PPM", "png": "PNG"}
    kinds |= {"jp2": "JPEG2000", "tga": "TGA", "jpe": "JPEG", "mpo": "MPO"}
    for suffix, kind in kinds.items():
        path = tmp_path / "a" / "2024" / "may" / f"x.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(pixels(0), kind))
    for name in ("x.heic", "y.HEIC", "read.me", ".hidden.png", "@eaDir/small.png", ".thumbnails/x.png"):
        (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(encode(pixels(0)))
    (tmp_path / "a" / "2024" / "round").symlink_to(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.png").write_bytes(encode(pixels(0)))
    for name in ("stray.png", ".stray.png", "readme.txt"):
        (tmp_path / name).write_bytes(encode(pixels(0)))
    source = FolderSource(str(tmp_path))
    assert source.num_rows == len(kinds) + 1
    assert source.classes == ("a", "b")
    for row in source.read(range(source.num_rows)):
        assert decode(row.image).shape == (3, 12, 16)
        assert Path(row.name).exists()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith(
        "passed over: 3 other files (2 .heic, 1 .me) and 1 image beside the class folders, such as a/read.me, "
        "a/x.heic, a/y.HEIC, stray.png"
    )
    pieces = open_folders(str(tmp_path), None).pieces
    assert sum(len(piece.samples()) for piece in pieces) == source.num_rows
    assert len(caplog.records) == 1, "once for a process"


def test_a_folder_without_classes_tells_what_it_passes_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("x.png", "below/y.png", "below/z.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encode(pixels(0)))
    assert FolderSource(str(tmp_path), labelled=False).num_rows == 2
    assert "passed over: 1 other file (1 .heic), such as below/z.heic" in caplog.text
    (tmp_path / "below" / "y.png").unlink()
    with pytest.raises(UserError, match=r"none of 1 class folders .*'below', 1 image beside them; expected"):
        FolderSource(str(tmp_path))
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"x")
    with pytest.raises(UserError, match=r"\.arrow files are not read: write Parquet"):
        FolderSource(str(tmp_path))


def test_links_to_nothing_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for place in (tmp_path / "a", tmp_path / "a" / "below"):
        place.mkdir()
        (place / "gone.png").symlink_to(tmp_path / "moved" / "x.png")
    (tmp_path / "a" / "circle.png").symlink_to(tmp_path / "a" / "circle.png")
    for name in ("b", ".#b"):  # the latter as Emacs writes it
        (tmp_path / name).symlink_to(tmp_path / "moved")
    with pytest.raises(UserError, match=r"none of 1 class folders .*'a', 4 links that lead to nothing; expected"):
        FolderSource(str(tmp_path))
    (tmp_path / "a" / "x.png").write_bytes(encode(pixels(0)))
    assert FolderSource(str(tmp_path)).num_rows == 1
    assert "passed over: 4 links to nothing, such as b, a/below/gone.png, a/circle.png" in caplog.text
    assert FolderSource(str(tmp_path / "a"), labelled=False).num_rows == 1
    assert "passed over: 3 links to nothing, such as below/gone.png, circle.png, gone.png" in caplog.text


def test_names_that_are_not_utf_8(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (b"caf\xe9", b"tea"):
        folder = os.path.join(os.fsencode(tmp_path), b"train", name)
        os.makedirs(folder)
        for file in (b"na\xefve.png", b"\xff.txt", b"plain.png"):
            with open(os.path.join(folder, file), "wb") as out:
                out.write(encode(pixels(0)))
    source = pickle.loads(pickle.dumps(FolderSource(str(tmp_path / "train"))))  # noqa: S301
    rows = source.read(range(4))
    assert [decode(row.image).shape for row in rows] == [(3, 12, 16)] * 4
    assert any("caf\\udce9/na\\udcefve.png" in row.name for row in rows)
    assert len(source.digest) == 16
    names = open_data(DataConfig(root=str(tmp_path), val_split="train")).names
    assert pa.array(names).to_pylist() == ["caf\\udce9", "tea"]  # Arrow refuses what is not UTF-8
    said = "".join(record.getMessage() for record in caplog.records)
    assert said.encode()
    assert "passed over: 2 other files (2 .txt)" in said
    target = str(tmp_path.parent / "made of bytes")
    manifest = prepare(PrepareConfig(source=str(tmp_path), target=target, block_rows=2))
    assert manifest.rows == 4
    assert manifest.classes == source.classes
    assert ParquetSource(storage.list_sizes(target, ".parquet")).classes == source.classes


def test_classes_without_images_keep_their_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder_set(tmp_path)
    before = FolderSource(str(tmp_path / "train"))
    (tmp_path / "train" / "bat").mkdir()
    caplog.clear()
    source = FolderSource(str(tmp_path / "train"))
    assert source.classes == ("ant", "bat", "bee", "cat")
    assert set(source.labels().tolist()) == {0, 2, 3}
    assert [row.image for row in source.read(range(12))] == [row.image for row in before.read(range(12))]
    assert "1 of 4 classes have no image here, the first is 'bat'; they keep their numbers" in caplog.text
    caplog.clear()
    (tmp_path / "val" / "zebra").mkdir()  # empty, and no class
    assert set(FolderSource(str(tmp_path / "val"), source.classes).labels().tolist()) == {0, 2, 3}
    assert "1 of 4 classes have no image" in caplog.text
    assert open_folders(str(tmp_path / "val"), source.classes).classes == source.classes


def test_the_store_is_told_how_much_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For how long others wait for a block depends on it."""
    sizes: list[int] = []
    monkeypatch.setattr(BlockStore, "get", lambda _, key, load, size=0: sizes.append(size) or load())
    root = f"memory://{uuid.uuid4().hex}"
    files = sorted((folder_set(tmp_path) / "train").rglob("*.*"))
    for path in files:
        storage.upload(path, f"{root}/{path.parent.name}/{path.name}")
    source = FolderSource(root, store=BlockStore(tmp_path / "store"))
    source.read([0])
    source.fetch(0)
    assert sizes == [sum(path.stat().st_size for path in files if path.suffix != ".txt")] * 2
