"""Small image sets for the tests of data/: Parquet files and class folders of generated images."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from mimkd_ray.data.sources.shard_manifest import Block, Manifest, Shard, content_digest, write_manifest

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def pixels(seed: int, height: int = 12, width: int = 16) -> np.ndarray:
    """A smooth random picture, (H, W, 3) uint8: survives JPEG nearly unchanged."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def encode(array: np.ndarray, kind: str = "PNG", mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).convert(mode).save(out, kind, **options)
    return out.getvalue()


def images(count: int, first: int = 0) -> list[bytes | None]:
    kinds = (("PNG", {}), ("JPEG", {"quality": 95}), ("WEBP", {"lossless": True}))
    return [encode(pixels(i), kinds[i % 3][0], **kinds[i % 3][1]) for i in range(first, first + count)]


def write_parquet(
    path: Path,
    files: list[bytes | None],
    labels: list[int | None],
    names: list[str] | None = None,
    row_group: int = 5,
    statistics: bool = True,
    plain: bool = False,
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if plain:
        column = pa.array(files, pa.binary())
    else:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        column = pa.array([{"bytes": f, "path": None} for f in files], kind)
    table = pa.table({"image": column, "label": pa.array(labels, pa.int64())})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group, write_statistics=statistics)


def parquet_set(root: Path, train: int = 32, val: int = 9, classes: int = 3) -> Path:
    """train in two files of row groups of 5 rows, validation in one; named classes."""
    names = [f"class {c}" for c in range(classes)]
    half = train // 2
    for part, (start, stop) in enumerate([(0, half), (half, train)]):
        path = root / f"train-0000{part}-of-00002.parquet"
        write_parquet(path, images(stop - start, start), [i % classes for i in range(start, stop)], names)
    path = root / "validation-00000-of-00001.parquet"
    write_parquet(path, images(val, 1000), [i % classes for i in range(val)], names)
    return root


def prepared_set(root: Path, train: int = 32, val: int = 9, classes: int = 3, block_rows: int = 5) -> Path:
    """`parquet_set` in the form of prepare_data: uniform blocks, ids, manifests. Three blocks to a training shard."""
    names = tuple(f"class {c}" for c in range(classes))
    for split, rows, first in (("train", train, 0), ("validation", val, 1000)):
        starts = list(range(0, rows, 3 * block_rows))
        shards = []
        for part, start in enumerate(starts):
            path = root / f"{split}-{part:05d}-of-{len(starts):05d}.parquet"
            ids = range(start, min(start + 3 * block_rows, rows))
            shards.append(_prepared_shard(path, ids, first, names, block_rows))
        digest = content_digest(names, shards)
        write_manifest(
            str(root),
            Manifest(
                split=split,
                rows=rows,
                block_rows=block_rows,
                classes=names,
                digest=digest,
                damaged=0,
                settings={},
                shards=tuple(shards),
            ),
        )
    return root


def _prepared_shard(path: Path, ids: range, first: int, names: tuple[str, ...], block_rows: int) -> Shard:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "image": pa.array([{"bytes": f, "path": "x"} for f in images(len(ids), first + ids[0])], kind),
            "label": pa.array([i % len(names) for i in ids], pa.int64()),
            "id": pa.array(ids, pa.int64()),
        }
    )
    features = {"label": {"names": list(names), "_type": "ClassLabel"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        table,
        path,
        row_group_size=block_rows,
        compression="none",
        use_dictionary=False,
        write_statistics=["label", "id"],
    )
    data = path.read_bytes()
    metadata = pq.ParquetFile(path).metadata
    blocks = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(i) for i in range(group.num_columns)]
        start = min(c.data_page_offset for c in columns)
        stop = max(c.data_page_offset + c.total_compressed_size for c in columns)
        blocks.append(Block(start, stop - start, group.num_rows, hashlib.sha256(data[start:stop]).hexdigest()))
    return Shard(path.name, len(ids), len(data), hashlib.sha256(data).hexdigest(), tuple(blocks))


def folder_set(root: Path, per_class: int = 4) -> Path:
    suffixes = (".png", ".jpg", ".webp", ".JPEG")
    kinds = ("PNG", "JPEG", "WEBP", "JPEG")
    for s, split in enumerate(("train", "val")):
        for c, name in enumerate(("ant", "bee", "cat")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                data = encode(pixels(100 * s + 10 * c + i), kinds[i % 4])
                (folder / f"{name}_{i}{suffixes[i % 4]}").write_bytes(data)
            (folder / "notes.txt").write_text("no image")
    return root


def write_tar(path: Path, files: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def tar_set(root: Path) -> Path:
    """train in two tars of 8 images, val in one of 9; three classes by their numbers, and a file of another kind."""
    for name, count, first in (("train-0", 8, 0), ("train-1", 8, 8), ("val-0", 9, 1000)):
        files = {"notes.npy": b"x"}
        for number, image in enumerate(images(count, first), first):
            files |= {f"{number:04d}.jpg": image or b"", f"{number:04d}.cls": str(number % 3).encode()}
        write_tar(root / f"{name}.tar", files)
    return root
