from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimkd_ray.data.store.stored_block import ChangedFileError, Identity, StoredBlock, read_stored


def _mapped(path: str, identity: Identity | None) -> memoryview:
    return memoryview(Path(path).read_bytes())


def _images(block: StoredBlock, rows: list[int]) -> list[bytes]:
    images = block.images(_mapped)
    return [bytes(images[o : o + n]) for o, n in zip(block.offsets[rows], block.lengths[rows], strict=True)]


def _block(images: list[bytes]) -> StoredBlock:
    return StoredBlock.of(images, np.arange(10, 10 + len(images)))


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=20))
def test_written_and_read(tmp_path_factory: pytest.TempPathFactory, images: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("store") / "x.block"
    block = _block(images)
    block.write(path, durable=False)
    assert path.stat().st_size == block.file_bytes()
    rows = list(range(len(images)))[::-1]
    for found in (block, read_stored(path), block.at(path)):
        assert _images(found, rows) == images[::-1]
        assert found.labels.tolist() == list(range(10, 10 + len(images)))
    assert read_stored(path).held_bytes == 24 * len(images)  # the images stay in the file


def _in_place(path: Path) -> StoredBlock:
    path.write_bytes(b"..one.three")
    return StoredBlock(
        np.array([2, 6]), np.array([3, 5]), np.array([0, 1]), path=str(path), identity=Identity.of(path.stat())
    )


def test_in_place_only_the_index_is_written(tmp_path: Path) -> None:
    source, path = tmp_path / "wörds.parquet", tmp_path / "x.block"
    block = _in_place(source)
    block.write(path, durable=True)
    assert path.stat().st_size == block.file_bytes() < 200
    found = read_stored(path)
    assert (found.path, found.identity) == (str(source), block.identity)
    assert _images(found, [1, 0, 1]) == [b"three", b"one", b"three"]
    assert found.at(path) is found


def test_a_file_that_is_written_again_is_noticed(tmp_path: Path) -> None:
    source = tmp_path / "set.parquet"
    block = _in_place(source)
    source.write_bytes(b"..two.seven")
    os.utime(source, ns=(1, 1))
    with pytest.raises(ChangedFileError, match=r"set\.parquet has been written again"):
        _images(block, [0])
    source.unlink()
    with pytest.raises(ChangedFileError, match=r"set\.parquet is gone"):
        _images(block, [0])


def test_a_stored_file_cut_short_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.block"
    block = _block([b"one", b"three"])
    block.write(path, durable=False)
    stored = read_stored(path)
    os.truncate(path, 5)
    with pytest.raises(ChangedFileError, match=r"is cut short: it has 5 bytes"):
        stored.images(_mapped)


def test_damage_to_the_index_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.block"
    _block([b"one", b"three"]).write(path, durable=False)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"too few|end is not|checksum"):
            read_stored(path)
    for place in range(len(b"onethree"), len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"end is not|checksum"):
            read_stored(path)
    with pytest.raises(FileNotFoundError):
        read_stored(tmp_path / "none")
