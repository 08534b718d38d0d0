"""A set on the device gives the ordinary loader's batches, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from image_sets import images, parquet_set, write_parquet

from mimkd_ray.config import DataConfig
from mimkd_ray.data.augment.pipelines import make_pipeline
from mimkd_ray.data.loading.batches import LaneBatch
from mimkd_ray.data.loading.loader import train_batches
from mimkd_ray.data.loading.resident import Resident, keeps_on_device, resident, resident_batches
from mimkd_ray.data.order.sample_order import Order
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.data.sources.parquet import ParquetSource
from mimkd_ray.data.sources.source import Source
from mimkd_ray.errors import DamagedDataError, UserError

CPU = torch.device("cpu")
CIFAR = make_pipeline("cifar", 12).train
DATA = DataConfig(pipeline="cifar", image_size=12, views=2, loader_workers=0)
DEVICES = [
    CPU,
    pytest.param(torch.device("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


def both(source: Source, device: torch.device, loader_workers: int = 0) -> tuple[list[LaneBatch], list[LaneBatch]]:
    """Batches of the ordinary loader, and those of the resident set."""
    order = Order(source.blocks, 3, 4, seed=1, window=3)
    span = {"lanes": [0, 2], "start_step": 1, "stop_step": 9}
    kept = Resident.load(source, replace(DATA, loader_workers=loader_workers), device)
    ordinary = train_batches(source, DATA, order, 5, **span)
    return list(ordinary), list(resident_batches(kept, order, views=2, **span))


def assert_same(ordinary: list[LaneBatch], kept: list[LaneBatch]) -> None:
    """Equal, and in the same memory layout."""
    assert len(ordinary) == len(kept) > 8
    for ours, theirs in zip(kept, ordinary, strict=True):
        assert (ours.step, ours.lane, ours.view, ours.damaged) == (
            theirs.step,
            theirs.lane,
            theirs.view,
            theirs.damaged,
        )
        assert ours.images_BCHW.dtype == torch.uint8
        assert ours.images_BCHW.is_contiguous(memory_format=torch.channels_last)
        for name in ("images_BCHW", "labels_B", "ids_B"):
            assert torch.equal(getattr(ours, name).cpu(), getattr(theirs, name)), name


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("loader_workers", [0, 2])
def test_batches_are_the_loaders(tmp_path: Path, device: torch.device, loader_workers: int) -> None:
    source = open_data(DataConfig(root=str(parquet_set(tmp_path)))).train
    assert_same(*both(source, device, loader_workers))


def test_a_subset_keeps_the_ids_of_the_whole(tmp_path: Path) -> None:
    source = open_data(DataConfig(root=str(parquet_set(tmp_path, train=60)), holdout=0.2, subset=30)).train
    ordinary, kept = both(source, CPU)
    assert_same(ordinary, kept)
    assert max(int(batch.ids_B.max()) for batch in kept) >= source.num_rows, "ids are not positions"


def test_damaged_images_are_replaced_as_the_loader_does(tmp_path: Path) -> None:
    files = images(32)
    for broken in (0, 1, 7, 13, 30):
        files[broken] = files[broken][:40]
    path = tmp_path / "train-0.parquet"
    write_parquet(path, files, [i % 3 - 2 for i in range(32)])
    source = ParquetSource({str(path): path.stat().st_size})
    ordinary, kept = both(source, CPU)
    assert sum(len(batch.damaged) for batch in ordinary) >= 5
    assert {label for batch in kept for label in batch.labels_B.tolist()} == {-1, 0}, "negative: without a label"
    assert_same(ordinary, kept)


def test_a_batch_without_an_intact_image_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "train-0.parquet"
    write_parquet(path, [b"none"] * 24, [0] * 24)
    source = ParquetSource({str(path): path.stat().st_size})
    kept = Resident.load(source, DATA, CPU)
    order = Order(source.blocks, 1, 4, seed=0)
    with pytest.raises(DamagedDataError, match="none of the 4 images"):
        next(resident_batches(kept, order, views=0, lanes=[0], start_step=0, stop_step=1))


def test_a_set_is_loaded_once_for_a_process(tmp_path: Path) -> None:
    source = open_data(DataConfig(root=str(parquet_set(tmp_path)))).train
    first = resident(source, DATA, CPU)
    assert resident(source, replace(DATA, loader_workers=1), CPU) is first
    other = resident(source, replace(DATA, image_size=10), CPU)
    assert other.images_NCHW.shape[2:] == (10, 10), "decoded anew for another size"


def test_when_a_set_is_kept_there() -> None:
    kept = DataConfig(pipeline="cifar", resident="on")
    assert keeps_on_device(kept, CIFAR, 50_000, CPU)
    assert not keeps_on_device(DataConfig(pipeline="cifar", resident="off"), CIFAR, 50_000, CPU)
    assert not keeps_on_device(DataConfig(pipeline="cifar"), CIFAR, 50_000, CPU), "automatic on a GPU alone"


def test_a_pipeline_that_draws_for_each_image_is_refused() -> None:
    with pytest.raises(UserError, match="pipeline 'imagenet' draws random numbers for each image"):
        open_data(DataConfig(pipeline="imagenet", resident="on"))
