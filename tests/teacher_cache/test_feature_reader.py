"""Reading by position against a plain read of the files, and what each kind of damage says."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from feature_sets import KEY, NOTHING_LOST, SHARDS, features, ids, write_view

from mimkd_ray import storage
from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.data.store.block_store import BlockStore
from mimkd_ray.errors import DamagedDataError
from mimkd_ray.teacher_cache import feature_reader as reader_module
from mimkd_ray.teacher_cache.feature_manifest import ViewManifest, publish
from mimkd_ray.teacher_cache.feature_reader import FeatureReader
from mimkd_ray.teacher_cache.writer import write_shard

KEYS = {"a:map": KEY, "b:map": "1" * 24, "c:vector": "2" * 24, "pixels": "3" * 24}
WIDTHS = {"a:map": 40, "b:map": 7, "c:vector": 100, "pixels": 80}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for label, key in KEYS.items():
        for view in range(2):
            write_view(tmp_path / "cache", key, WIDTHS[label], view)
    return tmp_path / "cache"


@pytest.fixture(params=["store", "no store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlockStore | None:
    return BlockStore(tmp_path / "store", 10**7) if request.param == "store" else None


def test_rows_are_those_of_the_positions(root: Path, store: BlockStore | None) -> None:
    reader = FeatureReader(str(root), KEYS, 64, store)
    generator = np.random.default_rng(0)
    for _ in range(2):  # cold and warm
        for view in (1, 0):
            positions = generator.integers(0, 64, 33)
            found = reader.read(view, positions, ids()[positions])
            assert list(found) == list(KEYS)
            for label, width in WIDTHS.items():
                np.testing.assert_array_equal(found[label], features(width, view)[positions])
    some = reader.read(0, np.array([63]), ids()[63:], ["pixels"])
    assert list(some) == ["pixels"]


def test_the_store_is_told_how_much_is_read(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For how long others wait for a block depends on it."""
    sizes: list[int] = []
    monkeypatch.setattr(BlockStore, "get", lambda _, key, load, size=0: sizes.append(size) or load())
    reader = FeatureReader(str(root), KEYS, 64, BlockStore(tmp_path / "store"), ["c:vector"])
    reader.read(0, np.array([0]), ids()[:1])
    reader.fetch(0, 16, 17)
    blocks = reader.manifest("c:vector", 0).shards[0].blocks
    assert sizes == [blocks[0].length, blocks[1].length]


def test_only_what_is_used_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry of four, counted in bytes that the storage gave out; nothing is read twice."""
    given: list[int] = []
    real = storage.read_range

    def read_range(url: str, offset: int, length: int) -> bytes:
        given.append(len(real(url, offset, length)))
        return real(url, offset, length)

    monkeypatch.setattr(storage, "read_range", read_range)
    reader = FeatureReader(str(root), KEYS, 64, None, ["c:vector"])
    everything = np.arange(64)
    for _ in range(2):
        found = reader.read(0, everything, ids())
    assert list(found) == ["c:vector"]
    assert reader.bytes_read == sum(b.length for s in reader.manifest("c:vector", 0).shards for b in s.blocks)
    assert reader.bytes_read == sum(given)
    one = reader.bytes_read
    reader.read(0, everything, ids(), list(KEYS))
    assert reader.bytes_read > 2 * one


def test_blocks_are_fetched_once_for_all_processes_of_a_node(root: Path, tmp_path: Path) -> None:
    store = BlockStore(tmp_path / "store", 10**7)
    first = FeatureReader(str(root), KEYS, 64, store)
    assert first.fetch(1, 16, 37)
    assert first.bytes_read > 0
    second = pickle.loads(pickle.dumps(first))  # noqa: S301
    second.read(1, np.arange(16, 37), ids()[16:37])
    assert second.bytes_read == 0
    second.read(1, np.array([40]), ids()[40:41])
    assert second.bytes_read > 0
    assert not FeatureReader(str(root), KEYS, 64, None).fetch(0, 0, 1), "there is nowhere to keep it"


def test_a_forked_reader_reads(root: Path) -> None:
    reader = FeatureReader(str(root), KEYS, 64, None)
    reader.read(0, np.arange(5), ids()[:5])
    child = os.fork()
    if child == 0:
        found = reader.read(0, np.arange(60, 64), ids()[60:])
        os._exit(0 if np.array_equal(found["a:map"], features(40, 0)[60:]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_ids_are_compared(root: Path) -> None:
    reader = FeatureReader(str(root), KEYS, 64, None)
    wrong = ids()[10:14].copy()
    wrong[2] = 5
    with pytest.raises(DamagedDataError, match=r"a:map, view 0: the features at position 12 are of image 43, .* 5:"):
        reader.read(0, np.arange(10, 14), wrong)
    with pytest.raises(DamagedDataError, match="has 64 rows, and the training set 63"):
        FeatureReader(str(root), KEYS, 63, None).read(0, np.arange(2), ids()[:2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[400] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flip, r"is damaged: the .* bytes at byte .* have the sha256"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:500]), "is cut short: it does not hold the"),
    "gone": (Path.unlink, "is gone, and its manifest lists it"),
}


def test_a_file_that_changes_while_it_is_in_use(root: Path, tmp_path: Path) -> None:
    """Verified, read in place, and then written again: it is verified anew."""
    store = BlockStore(tmp_path / "store", 10**7)
    reader = FeatureReader(str(root), {"a:map": KEY}, 64, store)
    (path,) = (root / KEY / "view-00000").glob("0000000000-*.parquet")
    whole, first = path.read_bytes(), np.arange(16)
    reader.read(0, first[:2], ids()[:2])
    read = reader.bytes_read
    path.write_bytes(whole[:300])
    with pytest.raises(DamagedDataError, match="is cut short"):
        reader.read(0, first[3:5], ids()[3:5])
    path.write_bytes(whole)
    np.testing.assert_array_equal(reader.read(0, first, ids()[:16])["a:map"], features(40, 0)[:16])
    assert reader.bytes_read == 3 * read
    assert sum(file.stat().st_size for file in (tmp_path / "store").glob("*.block")) < 300, "only where it lies is kept"


def test_a_cache_on_a_network_file_system_is_copied(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped file of a server that does not answer stops the process, or kills it."""
    monkeypatch.setattr(reader_module, "is_on_local_disk", lambda path: False)
    reader = FeatureReader(str(root), {"a:map": KEY}, 64, BlockStore(tmp_path / "store", 10**7))
    assert reader.distant
    assert reader.fetch(0, 0, 64)
    for path in (root / KEY / "view-00000").glob("*.parquet"):
        path.unlink()
    np.testing.assert_array_equal(reader.read(0, np.arange(64), ids())["a:map"], features(40, 0))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_never_read(root: Path, store: BlockStore | None, kind: str) -> None:
    damage, message = DAMAGE[kind]
    (path,) = (root / KEY / "view-00000").glob("0000000000-*.parquet")
    damage(path)
    reader = FeatureReader(str(root), KEYS, 64, store)
    np.testing.assert_array_equal(  # the other shard is sound
        reader.read(0, np.arange(37, 64), ids()[37:])["a:map"], features(40, 0)[37:]
    )
    blocks = {"gone": [(0, 16), (16, 32), (32, 37)], "cut": [(0, 16)], "flipped": [(0, 16)]}[kind]
    for start, stop in blocks * 2:
        with pytest.raises(DamagedDataError, match=f"{path.name} {message}.*verify --cache.root {root} --mend true`"):
            reader.read(0, np.arange(start, stop), ids()[start:stop])


def test_a_manifest_that_is_gone(root: Path) -> None:
    (root / KEY / "view-00001.manifest.json").unlink()
    with pytest.raises(DamagedDataError, match=r"view-00001.manifest.json is gone: it was there"):
        FeatureReader(str(root), KEYS, 64, None).read(1, np.arange(2), ids()[:2])


def test_an_image_that_had_no_features(tmp_path: Path) -> None:
    shards, first = [], 0
    for counts in SHARDS:
        part = slice(first, first + sum(counts))
        damaged = [int(ids()[3])] if first == 0 else []
        shards.append(
            write_shard(str(tmp_path), KEY, 0, first, ids()[part], features()[part], counts, damaged, NOTHING_LOST)
        )
        first += sum(counts)
    publish(str(tmp_path), ViewManifest(key=KEY, view=0, row_bytes=40, shards=tuple(shards)))
    reader = FeatureReader(str(tmp_path), {"a:map": KEY}, 64, None)
    reader.read(0, np.arange(3), ids()[:3])
    with pytest.raises(DamagedDataError, match="image 16 could not be decoded when its features were cached"):
        reader.read(0, np.arange(6), ids()[:6])


def test_sizes_for_reading_ahead(root: Path) -> None:
    reader = FeatureReader(str(root), KEYS, 64, None, ["a:map", "b:map"])
    size = sum(reader.manifest(label, 0).bytes for label in ("a:map", "b:map"))
    assert reader.block_bytes(Blocks.uniform(64, 16)) == 0, "read in place"
    reader.distant = True
    assert reader.block_bytes(Blocks.uniform(64, 16)) == size // 4
