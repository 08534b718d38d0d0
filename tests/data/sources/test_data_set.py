from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_sets import SHARED, encode, folder_set, images, parquet_set, pixels, prepared_set, write_parquet

from mimkd_ray.config import DataConfig
from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.data.sources import data_set, parquet
from mimkd_ray.data.sources.data_set import Data, open_data
from mimkd_ray.data.sources.source import Source
from mimkd_ray.errors import UserError


def _ids(source: Source) -> list[int]:
    return [row.id for row in source.read(range(source.num_rows))]


def test_digits_are_the_default() -> None:
    data = open_data(DataConfig())
    assert (data.train.num_rows, data.val.num_rows, data.num_classes) == (1347, 450, 10)
    pixels_of_all = np.stack([row.image for row in data.train.read(range(1347))]) / 255
    assert pixels_of_all.mean() == pytest.approx(DataConfig().mean[0], abs=0.002)
    assert pixels_of_all.std() == pytest.approx(DataConfig().std[0], abs=0.002)
    for alias in ("val", "validation", "test"):
        assert open_data(DataConfig(val_split=alias)).val.digest == data.val.digest


@pytest.mark.parametrize("layout", ["flat", "data", "dots", "split folders"])
def test_parquet_layouts(tmp_path: Path, layout: str) -> None:
    flat = parquet_set(tmp_path / "flat")
    root = tmp_path / "set"
    for path in sorted(flat.iterdir()):
        split = path.name.partition("-")[0]
        target = {
            "flat": root / path.name,
            "data": root / "data" / path.name,
            "dots": root / path.name.replace("-", ".", 1),
            "split folders": root / split / path.name.partition("-")[2],
        }[layout]
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    data = open_data(DataConfig(root=str(root)))
    assert (data.train.num_rows, data.val.num_rows) == (32, 9)
    assert data.classes == ("class 0", "class 1", "class 2")
    assert data.num_classes == 3


def test_classes_that_are_numbers_with_zeros_before_them_are_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", images(4), [0, 1, 0, 1], ["00", "01"])
    write_parquet(tmp_path / "val-0.parquet", images(2), [0, 1], ["dog", "cat"])
    with pytest.raises(UserError, match="the first difference is 'dog' for '00'"):
        open_data(DataConfig(root=str(tmp_path)))
    write_parquet(tmp_path / "train-0.parquet", images(4), [0, 1, 0, 1])
    assert open_data(DataConfig(root=str(tmp_path))).classes == ("0", "1")


def test_aliases_in_order(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", images(4), [0, 1, 0, 1])
    for rows, name in enumerate(("test", "valid", "val", "validation"), start=1):
        write_parquet(tmp_path / f"{name}-0.parquet", images(rows), [0] * rows)
        assert open_data(DataConfig(root=str(tmp_path))).val.num_rows == rows
    assert open_data(DataConfig(root=str(tmp_path), val_split="valid")).val.num_rows == 2


def test_class_folders(tmp_path: Path) -> None:
    data = open_data(DataConfig(root=str(folder_set(tmp_path))))
    assert (data.train.num_rows, data.val.num_rows) == (12, 12)
    assert data.classes == ("ant", "bee", "cat")


def test_class_folders_without_splits(tmp_path: Path) -> None:
    """DIR/CLASS/image with a holdout: the images of the same folders as a split, dealt alike. A folder that has the
    name of a split, in any case, is none of a class."""
    root = folder_set(tmp_path)
    alone = open_data(DataConfig(root=str(root / "train"), holdout=0.25))
    split = open_data(DataConfig(root=str(root), holdout=0.25))
    assert alone.classes == ("ant", "bee", "cat")
    assert (_ids(alone.train), _ids(alone.val)) == (_ids(split.train), _ids(split.val))
    judged = open_data(DataConfig(root=str(root / "train"), holdout=0.25), for_training=False)
    assert _ids(judged.val) == _ids(alone.val), "an evaluation has the images that the run held out"
    others = open_data(DataConfig(root=str(root / "train"), holdout=0.25), for_training=False, others=True)
    assert (others.val.num_rows, others.train.num_rows) == (12, 0)
    assert "take --data.holdout 0.1" in _error(root=str(root / "train"))
    (root / "train").rename(root / "Train")
    assert "has no training split 'train'" in _error(root=str(root), holdout=0.25)


def test_opening_reads_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet_set(tmp_path)

    def never(*args: object) -> None:
        raise AssertionError("a row group or label column was read")

    monkeypatch.setattr(parquet.ParquetSource, "_load", never)
    monkeypatch.setattr(parquet, "_label_column", never)
    open_data(DataConfig(root=str(tmp_path)))


def test_a_slow_order_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_data(DataConfig(root=str(prepared_set(tmp_path / "plain")), store_gb=1e-6))
    assert not caplog.records, "on a local disk rows are read where they are"
    root = str(parquet_set(tmp_path / "compressed"))
    open_data(DataConfig(root=root, store_gb=1e-6))
    assert "most reads will cost a whole block" in caplog.text
    caplog.clear()
    monkeypatch.setattr(parquet, "is_on_local_disk", lambda path: False)
    block = open_data(DataConfig(root=root)).train.block_bytes
    open_data(DataConfig(root=root, store_gb=2.5 * block / 1e9, window=2))
    assert not caplog.records
    open_data(DataConfig(root=root, store_gb=2.5 * block / 1e9, window=3))
    assert "data.window = 3 has 3 blocks" in caplog.text
    caplog.clear()
    open_data(DataConfig(root=root, store_gb=2.5 * block / 1e9))
    assert "data.window = full has 8 blocks" in caplog.text
    assert "--data.store-gb" in caplog.text


def test_without_a_store_a_process_must_hold_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = str(parquet_set(tmp_path))
    monkeypatch.setattr(parquet, "is_on_local_disk", lambda path: False)
    assert open_data(DataConfig(root=root, store_gb=0)).train.store is None
    assert not caplog.records
    monkeypatch.setattr(data_set, "CACHE_BYTES", 1000)
    open_data(DataConfig(root=root, store_gb=0))
    assert "a process keeps" in caplog.text


def test_a_prepared_set_is_opened_by_its_manifest(tmp_path: Path) -> None:
    root = prepared_set(tmp_path / "set")
    data = open_data(DataConfig(root=str(root), store=str(tmp_path / "here"), store_gb=1))
    assert (data.train.num_rows, data.val.num_rows, data.num_classes) == (32, 9, 3)
    assert data.train.blocks == Blocks.uniform(32, 5)
    assert data.train.store is not None
    assert (data.train.store.folder, data.train.store.max_bytes) == (tmp_path / "here", 10**9)
    assert not (tmp_path / "here").exists()  # until something is read
    for path in root.glob("train-*"):
        path.unlink()
    assert "train-00000-of-00003.parquet is missing" in _error(root=str(root))
    (root / "train.manifest.json").write_text('{"version": 1')
    assert "train.manifest.json" in _error(root=str(root))


def test_windows() -> None:
    assert DataConfig().window_blocks == 0
    assert DataConfig(window=3).window_blocks == 3


def test_holdout_and_subset() -> None:
    data = open_data(DataConfig(holdout=0.2, subset=100))
    held, used = _ids(data.val), _ids(data.train)
    assert len(held) == round(0.2 * 1347)
    assert len(used) == 100
    assert not set(held) & set(used)
    assert np.bincount(data.train.labels()).tolist() == [10] * 10
    other = open_data(DataConfig(holdout=0.2, subset=100, split_seed=1))
    assert _ids(other.val) != held
    # The held-out rows do not depend on the subset.
    assert _ids(open_data(DataConfig(holdout=0.2)).val) == held
    digests = {open_data(DataConfig()).digest, data.digest, other.digest}
    assert len(digests) == 3


def test_holdout_leaves_the_validation_set_alone(tmp_path: Path) -> None:
    parquet_set(tmp_path)
    (tmp_path / "validation-00000-of-00001.parquet").write_bytes(b"not even Parquet")
    data = open_data(DataConfig(root=str(tmp_path), holdout=0.25))
    assert (data.train.num_rows, data.val.num_rows) == (24, 8)


def test_train_as_validation(tmp_path: Path) -> None:
    parquet_set(tmp_path)
    data = open_data(DataConfig(root=str(tmp_path), val_split="train"))
    assert data.val.num_rows == data.train.num_rows == 32


def _error(**changes: object) -> str:
    with pytest.raises(UserError) as caught:
        open_data(DataConfig(**changes))  # type: ignore[arg-type]
    return str(caught.value)


def test_place_errors(tmp_path: Path) -> None:
    assert "does not exist" in _error(root=str(tmp_path / "nowhere"))
    assert "neither Parquet files nor folders" in _error(root=str(tmp_path))
    write_parquet(tmp_path / "cats.parquet", images(2), [0, 1])
    message = _error(root=str(tmp_path))
    assert "no training split 'train'" in message
    assert "cats.parquet" in message
    write_parquet(tmp_path / "train-0.parquet", images(2), [0, 1])
    message = _error(root=str(tmp_path))
    for part in ("no validation split", "train-0.parquet", "--data.val-split train", "--data.holdout 0.1"):
        assert part in message
    assert "(nosuch)" in _error(root=str(tmp_path), val_split="nosuch")
    assert "no training split 'dev'" in _error(train_split="dev")


def test_label_errors(tmp_path: Path) -> None:
    root = str(tmp_path)
    write_parquet(tmp_path / "train-0.parquet", images(4), [0, 1, 2, 3], ["a", "b", "c", "d"])
    write_parquet(tmp_path / "val-0.parquet", images(2), [0, 1])
    assert open_data(DataConfig(root=root, num_classes=10)).num_classes == 10
    message = _error(root=root, num_classes=3)
    assert "labels up to 3" in message
    assert "--data.num-classes 4" in message
    write_parquet(tmp_path / "val-0.parquet", images(2), [0, 7])
    assert "validation set has labels up to 7" in _error(root=root)
    write_parquet(tmp_path / "val-0.parquet", images(2), [-1, -1])
    assert "hidden labels" in _error(root=root)
    write_parquet(tmp_path / "val-0.parquet", images(2), [0, 1], ["a", "B", "c", "d"])
    assert "the first difference is 'B' for 'b'" in _error(root=root)


@pytest.mark.parametrize("label", [10**12, 0xFFFFFFFF, 10**6])
@pytest.mark.parametrize("changes", [{}, {"num_classes": 3}, {"holdout": 0.5}, {"num_classes": 3, "subset": 2}])
def test_a_label_that_is_none_is_said_before_it_takes_memory(
    tmp_path: Path, label: int, changes: dict[str, object]
) -> None:
    kind = pa.uint32() if label == 0xFFFFFFFF else pa.int64()
    for split, last in (("train", label), ("val", 1)):
        table = pa.table({"image": pa.array(images(4)), "label": pa.array([0, 1, 1, last], kind)})
        pq.write_table(table, tmp_path / f"{split}-0.parquet")
    tracemalloc.start()
    try:
        message = _error(root=str(tmp_path), **changes)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    for part in (f"labels up to {label:,}", "train-0.parquet", "--data.label-column"):
        assert part in message


def test_a_label_of_validation_that_is_none(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", images(2), [0, 1], ["a", "b"])
    write_parquet(tmp_path / "val-0.parquet", images(2), [0, 10**12], ["a", "b"])
    assert "labels up to 1,000,000,000,000" in _error(root=str(tmp_path))


def test_hidden_training_labels_are_said_before_the_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", images(4), [0, 1, -1, -1])
    assert "the training set has labels down to -1" in _error(root=str(tmp_path), holdout=0.5)


def test_split_size_errors() -> None:
    assert "1,347 training rows" in _error(subset=1348)
    assert "leaves 1,347 to train on and 0" in _error(holdout=0.0001)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"root": ""}, "data.root is empty"),
        ({"holdout": 1.0}, "data.holdout = 1.0"),
        ({"holdout": -0.1}, "data.holdout"),
        ({"max_damaged": 1.5}, "data.max_damaged is 1.5: give 1 at most"),
        ({"subset": -1}, "data.subset is -1: give 0 or more"),
        ({"views": -1}, "data.views"),
        ({"window": -1}, "data.window = -1: give 'full'"),
        ({"window": 0}, "data.window = 0"),
        ({"window": "all"}, "data.window is 'all'"),
        ({"read_ahead": -2}, "data.read_ahead is -2: give -1 or more"),
        ({"store_gb": -1.0}, "data.store_gb is -1.0: give 0 or more"),
        ({"store_gb": float("inf")}, "data.store_gb is inf"),
        ({"loader_workers": -2}, "data.loader_workers"),
        ({"num_classes": -1}, "data.num_classes"),
        ({"pipeline": "cifra"}, "did you mean 'cifar'"),
        ({"num_classes": 10**9}, "data.num_classes is 1,000,000,000: give 1,000,000 at most"),
        ({"image_size": 0}, "data.image_size is 0: give 1 or more"),
        ({"image_size": 100_000}, "data.image_size is 100,000: give 8,192 at most"),
        ({"max_pixels": 0}, "data.max_pixels = 0"),
        ({"max_pixels": 10**9}, "data.max_pixels = 1,000,000,000: give 1 to 178,956,970"),
        ({"std": (0.1, 0.0, 0.1)}, "data.std"),
        ({"mean": (0.1, float("nan"), 0.1)}, "data.mean"),
    ],
)
def test_config_errors(changes: dict[str, object], message: str) -> None:
    assert message in _error(**changes)


def test_validation_folder_without_classes(tmp_path: Path) -> None:
    folder_set(tmp_path)
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "ILSVRC2012_val_00000001.JPEG").write_bytes(encode(pixels(0), "JPEG"))
    assert "expected <class>/<image>" in _error(root=str(tmp_path))


def _shared(name: str, **changes: object) -> Data:
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not here: development data outside the repository")
    return open_data(DataConfig(root=str(SHARED / name), **changes))  # type: ignore[arg-type]


def test_cifar100() -> None:
    data = _shared("cifar100")
    assert (data.train.num_rows, data.val.num_rows, data.num_classes) == (50_000, 10_000, 100)
    assert data.classes[:2] == ("apple", "aquarium_fish")
    assert np.bincount(data.val.labels()).tolist() == [100] * 100
    row = data.train.read([25_017])[0]
    assert row.id == 25_017
    assert row.name == "train-00001-of-00002.parquet row 17"


def test_imagenet_samples() -> None:
    data = _shared("imagenet_samples", val_split="train")
    assert (data.train.num_rows, data.num_classes) == (500, 1000)
    with pytest.raises(UserError, match=r"no validation split.*--data\.holdout 0\.1.*--data\.val-split train"):
        _shared("imagenet_samples")
