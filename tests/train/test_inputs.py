"""Settings of the data section reach every reader of images in a run: training, teacher, evaluation, resident sets."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_run import run_tiny, tiny_config, tiny_data

from mimkd_ray.cli.local_launch import LocalContext
from mimkd_ray.data.loading import loader
from mimkd_ray.data.loading.read_ahead import ReadAhead
from mimkd_ray.models.build_model import build_model
from mimkd_ray.train.engine.inputs import Inputs
from mimkd_ray.train.networks.build import plan_student


def _parquet(path: Path, rows: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    files = []
    for _ in range(rows):
        out = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, "PNG")
        files.append(out.getvalue())
    table = pa.table({"image": pa.array(files, pa.binary()), "label": pa.array(np.arange(rows) % 10)})
    pq.write_table(table, path, row_group_size=20)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    _parquet(folder / "train-0.parquet", 60, seed=1)
    _parquet(folder / "validation-0.parquet", 40, seed=2)
    return folder


@pytest.mark.parametrize("resident", ["off", "on"])
@pytest.mark.parametrize("read_ahead", [0, -1])
def test_without_reading_ahead_no_reader_of_a_run_does(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_ahead: int, resident: str
) -> None:
    """The teacher's evaluation, training and two evaluations of the student; automatic: each of them does."""
    started: list[int] = []

    class Counted(ReadAhead):
        def __init__(self, source: Any, *rest: Any) -> None:
            started.append(source.blocks.num_rows)
            super().__init__(source, *rest)

    monkeypatch.setattr(loader, "ReadAhead", Counted)
    data = {"root": str(root), "subset": 0, "store": str(tmp_path / "blocks"), "read_ahead": read_ahead}
    run_tiny(tmp_path / "run", data=data | {"resident": resident})
    if read_ahead == 0:
        assert started == []
    else:
        assert set(started) == {40, 60}, "this test must see the readers of both splits"


def test_held_out_batches_are_brought_to_the_device_as_training_batches_are() -> None:
    """Ahead of need, that is, and on a GPU from page-locked memory."""
    config = tiny_config(data={"resident": "off"})
    data, teacher = tiny_data(config), build_model("cifar/resnet8", 10)
    inputs = Inputs([plan_student(config, teacher, 10)], data, teacher, LocalContext(torch.device("meta")))
    batches = list(inputs.held_out(100))
    assert sum(map(len, batches)) == data.val.num_rows
    assert {tensor.device.type for batch in batches for tensor in batch.tensors()} == {"meta"}
