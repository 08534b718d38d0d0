"""Helper processes under another default start method than fork (Python 3.14: forkserver): nothing is switched off."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from image_sets import prepared_set
from test_loader import count_slots

from mimkd_ray.config import DataConfig
from mimkd_ray.data.loading.loader import PREFETCH, SPARE_SLOTS, train_batches
from mimkd_ray.data.loading.read_ahead import PARENT_POLL_S
from mimkd_ray.data.loading.start_method import helper_context
from mimkd_ray.data.order.sample_order import Order
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.data.sources.source import Source

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


@pytest.fixture(params=["forkserver", "spawn"])
def default_method(request: pytest.FixtureRequest) -> Iterator[str]:
    """The program's default start method, for the time of a test."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    root = str(prepared_set(tmp_path / "set"))
    return open_data(DataConfig(root=root, store=str(tmp_path / "blocks"))).train


def _batches(source: Source, workers: int, steps: int = 8) -> Any:
    order = Order(source.blocks, 2, 4, seed=1, window=2)
    data = DataConfig(pipeline="none", image_size=8, views=1, loader_workers=workers)
    return train_batches(source, data, order, 1, lanes=[0, 1], start_step=0, stop_step=steps)


def test_the_programs_default_does_not_count(default_method: str) -> None:
    assert helper_context().get_start_method() == "fork"
    assert multiprocessing.get_start_method() == default_method


def test_images_still_come_in_shared_slots(
    source: Source, default_method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = count_slots(monkeypatch)
    inline = list(_batches(source, workers=0))
    found = list(_batches(source, workers=1))
    assert len(found) == len(inline) == 16
    for ours, expected in zip(found, inline, strict=True):
        assert torch.equal(ours.images_BCHW, expected.images_BCHW)
        assert torch.equal(ours.ids_B, expected.ids_B)
    (slots,) = made
    places = {slots.memory(slot).data_ptr() for slot in range(PREFETCH + SPARE_SLOTS)}
    assert {batch.images_BCHW.data_ptr() for batch in found} & places == places, "each slot holds a batch"


def test_blocks_are_still_read_ahead(source: Source, default_method: str, tmp_path: Path) -> None:
    """The process goes on for longer than it takes to look whether its parent lives."""
    batches = _batches(source, workers=1, steps=10**6)
    next(batches)
    deadline = time.monotonic() + 30
    while len(list((tmp_path / "blocks").glob("*.block"))) < 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(2 * PARENT_POLL_S)
    (reader,) = (child for child in multiprocessing.active_children() if child.name == "read-ahead")
    assert reader.is_alive()
    assert len(list((tmp_path / "blocks").glob("*.block"))) == 7
    batches.close()
