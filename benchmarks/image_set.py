"""The images of the data benchmarks: given ones or generated photographs, and a prepared set of them."""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from mimkd_ray.config import DataConfig, PrepareConfig
from mimkd_ray.data.augment.transforms import ResizedCropFlip, from_bytes
from mimkd_ray.data.prepare.make_shards import prepare
from mimkd_ray.data.sources.data_set import open_data

SIZE = 224  # pixels that the networks see
CLASSES = 10  # of the generated images
DISTINCT = 256  # generated images, repeated to the rows wanted
SHORT, LONG = 256, 341  # their sides in pixels
QUALITY = 90


class Encoded(NamedTuple):
    """An image as stored, and its label."""

    image: bytes
    label: int


def add_options(options: argparse.ArgumentParser, rows: int) -> None:
    """Add the options of the benchmarks that decode images."""
    options.add_argument(
        "--images", metavar="DIR", help="Parquet files or class folders of a split 'train' (default: generated JPEGs)"
    )
    options.add_argument("--rows", type=int, default=rows, help="images of a pass; the given ones are repeated")


def photograph(seed: int) -> bytes:
    """Return a JPEG of about 30 kB that costs a decoder as much as a photograph of its size: noise of all scales,
    1/f."""
    rng = np.random.default_rng(seed)
    picture = np.full((SHORT, LONG, 3), 128.0)
    for cells in (2, 4, 8, 16, 32, 64, 128, 256):
        grey = rng.normal(size=(cells, cells, 1))
        tint = rng.normal(size=(cells, cells, 3)) * 0.3
        coarse = np.clip(128 + 42 * (grey + tint), 0, 255).astype(np.uint8)
        fine = Image.fromarray(coarse).resize((LONG, SHORT), Image.Resampling.BICUBIC)
        picture += (np.asarray(fine, np.float64) - 128) * min(1.0, 4 / cells**0.6)
    out = io.BytesIO()
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def images(folder: str | None, rows: int) -> list[Encoded]:
    """Return `rows` encoded images: those of the folder or generated ones, repeated as often as needed."""
    if folder is None:
        found = [Encoded(photograph(seed), seed % CLASSES) for seed in range(min(rows, DISTINCT))]
    else:
        source = open_data(DataConfig(root=folder, val_split="train", store_gb=0)).train
        found = [Encoded(bytes(row.image), row.label) for row in source.read(range(min(rows, source.num_rows)))]
    print(
        f"{rows:,} images, {len(found):,} of them distinct ({'given' if folder else 'generated'}), "
        f"{sum(len(e.image) for e in found) / len(found) / 1000:.1f} kB on average",
        flush=True,
    )
    return [found[row % len(found)] for row in range(rows)]


def write_parquet(rows: Sequence[Encoded], file: Path) -> None:
    """Write the rows as one Parquet file in the Hugging Face layout."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "image": pa.array([{"bytes": row.image, "path": None} for row in rows], kind),
            "label": pa.array([row.label for row in rows], pa.int64()),
        }
    )
    table = table.replace_schema_metadata(
        {
            "huggingface": '{"info": {"features": {"image": {"_type": "Image"}, '
            '"label": {"dtype": "int64", "_type": "Value"}}}}'
        }
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=100, compression="none", use_dictionary=False)


def prepared(rows: Sequence[Encoded], folder: Path, target: str, block_rows: int) -> None:
    """Make a prepared set of the rows at `target`, a folder or URL; `folder` is for intermediate files."""
    file = folder / "train-00000-of-00001.parquet"
    write_parquet(rows, file)
    # Small files: moto reads a whole object to answer for a part of it.
    prepare(PrepareConfig(source=str(folder), target=target, block_rows=block_rows, shard_rows=2 * block_rows))


def bare_rate(rows: Sequence[Encoded], processes: int, warm_up: int) -> float:
    """Return the images/s of decoding and transforming the rows, in memory, in processes that do nothing else.

    Counted from the moment when all have done `warm_up` images each to the end of the last one.
    """
    context = get_context("fork")  # the rows are there already
    barrier = context.Barrier(processes + 1)
    workers = [
        context.Process(target=_decode, args=(rows[part::processes], warm_up, barrier)) for part in range(processes)
    ]
    for worker in workers:
        worker.start()
    barrier.wait()
    began = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - began
    for worker in workers:
        worker.join()
        worker.close()
    return len(rows) / seconds


def _decode(rows: Sequence[Encoded], warm_up: int, barrier: Any) -> None:
    torch.set_num_threads(1)
    transform = ResizedCropFlip(SIZE)
    for row in rows[:warm_up]:
        from_bytes(transform, row.image)
    barrier.wait()
    for row in rows:
        from_bytes(transform, row.image)
    barrier.wait()
