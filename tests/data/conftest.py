"""Block stores of a test's own, and a prepared set, for the tests of data/."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from image_sets import encode, pixels
from prepare_sets import config

from mimkd_ray.data.prepare.make_shards import prepare
from mimkd_ray.data.store import block_reader


@pytest.fixture(autouse=True)
def own_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's block store and tables in memory are its own, and go with it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(block_reader, "_blocks", block_reader._KeptBlocks())


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
