"""Data sets and weights files that cannot be used, by name, for tests."""

from __future__ import annotations

import datetime
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image

from mimkd_ray.models.build_model import build_model

ROWS = 40


def _png() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


IMAGES = pa.array([_png()] * ROWS, pa.binary())
LABELS = pa.array([row % 4 for row in range(ROWS)])


def table(labels: Any = LABELS, images: Any = IMAGES, **metadata: bytes) -> pa.Table:
    """Return a set of 40 images of one colour."""
    return pa.table({"image": images, "label": labels}).replace_schema_metadata(metadata)


def _first(label: int, kind: Any = None) -> pa.Table:
    return table(pa.array([label, *LABELS.to_pylist()[1:]], kind or pa.int64()))


def _parquet(rows: pa.Table, damage: Callable[[bytearray], object] = lambda data: None) -> bytes:
    out = io.BytesIO()
    pq.write_table(rows, out)
    data = bytearray(out.getvalue())
    damage(data)
    return bytes(data)


def _break_footer(data: bytearray) -> None:
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    data[start : start + 60] = b"\xee" * 60


def _cut(data: bytearray) -> None:
    del data[-100:]


DAYS = [datetime.date(2020, 1, 1 + row % 4) for row in range(ROWS)]

SETS: dict[str, Callable[[], bytes]] = {
    "broken footer": lambda: _parquet(table(), _break_footer),
    "cut short": lambda: _parquet(table(), _cut),
    "empty": lambda: b"",
    "deep metadata": lambda: _parquet(table(huggingface=b"[" * 100_000)),
    "two labels": lambda: _parquet(pa.Table.from_arrays([IMAGES, LABELS, LABELS], names=["image", "label", "label"])),
    "two images": lambda: _parquet(pa.Table.from_arrays([IMAGES, IMAGES, LABELS], names=["image", "image", "label"])),
    "nested images": lambda: _parquet(table(images=pa.array([{"bytes": {"b": _png()}}] * ROWS))),
    "nested labels": lambda: _parquet(table(pa.array([{"label": 1}] * ROWS))),
    "dates": lambda: _parquet(table(pa.array(DAYS))),
    "timestamps": lambda: _parquet(table(pa.array(DAYS).cast(pa.timestamp("us")))),
    "decimals": lambda: _parquet(table(LABELS.cast(pa.decimal128(19, 0)))),
    "fractions": lambda: _parquet(table(pc.add(LABELS.cast(pa.float64()), 0.5))),
    "label 10^12": lambda: _parquet(_first(10**12)),
    "label 2^32-1": lambda: _parquet(_first(2**32 - 1, pa.uint32())),
    "label 2^64-1": lambda: _parquet(_first(2**64 - 1, pa.uint64())),
    "label -5": lambda: _parquet(_first(-5)),
    "no rows": lambda: _parquet(table().slice(0, 0)),
    "lists": lambda: _parquet(table(images=pa.array([[_png()]] * ROWS))),
}


def data_set(name: str, folder: Path) -> Path:
    """Make a set whose training split is as its name says, and return its folder."""
    folder.mkdir()
    (folder / "train-00000-of-00001.parquet").write_bytes(SETS[name]())
    (folder / "validation-00000-of-00001.parquet").write_bytes(_parquet(table()))
    return folder


def _changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    state = build_model("cifar/resnet8", 10).state_dict()
    name = next(name for name, value in state.items() if value.dim() == 4)
    return {**state, name: change(state[name])}


WEIGHTS: dict[str, Callable[[], Any]] = {
    "NaN": lambda: _changed(lambda value: value * float("nan")),
    "one infinite": lambda: _changed(lambda value: value.index_fill(0, torch.tensor([1]), float("inf"))),
    "int8": lambda: _changed(lambda value: (100 * value).to(torch.int8)),
    "sparse": lambda: _changed(lambda value: value.to_sparse()),
    "meta": lambda: _changed(lambda value: value.to("meta")),
    "module": lambda: build_model("cifar/resnet8", 10),
    "list": lambda: [1, 2],
    "other network": lambda: build_model("cifar/resnet20", 10).state_dict(),
    "other classes": lambda: build_model("cifar/resnet8", 7).state_dict(),
    "not finished": lambda: _changed(lambda value: value),
    "pointer": list,
    "pipe": list,
}


def weights(name: str, file: Path) -> Path:
    """Make a weights file for cifar/resnet8 that is as its name says, and return it."""
    torch.save(WEIGHTS[name](), file)
    if name == "pointer":
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    if name == "pipe":
        file.unlink()
        os.mkfifo(file)
    if name == "not finished":
        file.write_bytes(file.read_bytes()[:5000])
    return file
