"""The two kinds of work of data preparation. Each unit is restartable, and commits by one atomic write at its end.

1. `PartUnit`: read a piece of the source, decode every image to check it, shrink it if requested, and write a *part*:
   a blob of records sorted by the rows' random keys, and then its index, which commits it.
2. `ShardUnit`: gather the rows of a shard, one byte range of every part, write the Parquet file, and then its
   sidecar (its entry of the manifest), which commits it.

A unit that runs twice writes the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mimkd_ray import storage
from mimkd_ray.data.augment.decode import DECODING, DamagedImageError, Decoding, decode
from mimkd_ray.data.order.random_numbers import permutation, raw
from mimkd_ray.data.prepare.input_pieces import THREADS, Piece
from mimkd_ray.data.sources.shard_manifest import Block, Shard
from mimkd_ray.errors import DamagedDataError, UserError

# A record is a header, the name, the image: key, label, bytes of name, bytes of image; crc32 of all except itself.
_FIELDS = struct.Struct("<dqIQ")
_CRC = struct.Struct("<I")


class Done(NamedTuple):
    """Result of a finished unit: rows written, and bytes of the source processed."""

    rows: int
    bytes: int


def class_keys(count: int, seed: int, label: int) -> np.ndarray:
    """Return the random keys of a class's rows, in the source's order: float64 in [0, 1], one in each [i, i+1) / count.

    Sorting all rows of a set by key spreads every class evenly. With N rows and C classes, of which this one has n
    rows: below any key t lie n*t of its rows, with an error below 1, so B adjacent rows hold B * n / N of them, with an
    error that is always below 2 + 2 * n * C / N (4 for equal classes) and mostly below 1.
    """
    rank = permutation(count, seed, "prepare rank", label)
    inside = (raw(count, seed, "prepare place", label) >> np.uint64(11)) * 2.0**-53
    return (rank + inside) / max(count, 1)


class Index(NamedTuple):
    """Content of a finished part: its rows' keys and record lengths in the blob's order, and the images left out."""

    keys: list[float]
    lengths: list[int]
    damaged: list[list[str]]
    """[name, reason] of each image that could not be decoded, in the source's order."""


@dataclass(frozen=True)
class PartUnit:
    """A unit that makes a piece of the source into a part."""

    number: int
    piece: Piece
    keys: np.ndarray | None
    """Key of each row; None for a piece that is a whole class, whose rows are counted when it is read."""
    seed: int
    short_side: int
    quality: int
    work: str
    """Folder or URL of parts and sidecars."""
    max_pixels: int = DECODING.max_pixels

    @property
    def bytes(self) -> int:
        """Number of bytes to read."""
        return self.piece.bytes

    def __call__(self) -> Done:
        """Write the part and commit it. Holds the piece twice in memory."""
        samples = self.piece.samples()
        keys = class_keys(len(samples), self.seed, samples[0].label) if self.keys is None else self.keys
        records: list[tuple[float, bytes]] = []
        damaged: list[list[str]] = []
        for key, sample in zip(keys.tolist(), samples, strict=True):
            try:
                image = checked(sample.image, self.short_side, self.quality, self.max_pixels)
            except DamagedImageError as error:
                damaged.append([sample.name, str(error)])
            else:
                records.append((key, _pack(key, sample.label, sample.name, image)))
        records.sort(key=lambda record: record[0])
        blob = b"".join(record for _, record in records)
        index = Index([key for key, _ in records], [len(record) for _, record in records], damaged)
        storage.write_bytes(blob_url(self.work, self.number), blob)
        storage.write_bytes(index_url(self.work, self.number), json.dumps(index._asdict()).encode())
        return Done(len(records), self.piece.bytes)

    def finished(self, sizes: Mapping[str, int]) -> Index | None:
        """Return the part's index, None if it is not there as that says; `sizes` are those of the files in `work`."""
        there, url = sizes.get(blob_url(self.work, self.number)), index_url(self.work, self.number)
        index = _read_commit(url, lambda value: Index(**value)) if there is not None else None
        return index if index is not None and there == sum(index.lengths) else None


@dataclass(frozen=True)
class ShardUnit:
    """A unit that makes rows `first_id` .. `first_id + rows - 1` of the prepared set into a shard."""

    number: int
    file: str
    first_id: int
    rows: int
    block_rows: int
    ranges: tuple[tuple[int, int, int], ...]
    """(part, start, stop) of each byte range, in the order of parts."""
    classes: tuple[str, ...]
    target: str
    work: str

    @property
    def bytes(self) -> int:
        """Number of bytes to gather."""
        return sum(stop - start for _, start, stop in self.ranges)

    def __call__(self) -> Done:
        """Write the shard and commit it. Holds its bytes twice in memory, and one block a third time.

        Raises DamagedDataError if a part differs from what was written.
        """
        rows = [row for _, row in sorted(_gather(self), key=lambda pair: pair[0])]
        if len(rows) != self.rows:
            raise DamagedDataError(f"{self.file}: the parts in {self.work} hold {len(rows)} of its {self.rows} rows")
        data = _write_parquet(self, rows)
        rows.clear()
        shard = _describe(self.file, data)
        storage.write_bytes(storage.join(self.target, self.file), data)
        storage.write_bytes(sidecar_url(self.work, self.number), json.dumps(shard).encode())
        return Done(self.rows, self.bytes)

    def finished(self, sizes: Mapping[str, int]) -> Shard | None:
        """Return the shard's description, None if it is not there as that says; `sizes` are those of the files in
        `target`."""
        there = sizes.get(storage.join(self.target, self.file))
        shard = _read_commit(sidecar_url(self.work, self.number), _shard_of) if there is not None else None
        return shard if shard is not None and there == shard.bytes else None


def blob_url(work: str, part: int) -> str:
    """Return the URL of a part's records."""
    return storage.join(work, f"part-{part:05d}.blob")


def index_url(work: str, part: int) -> str:
    """Return the URL of a part's index, which exists once the part is finished."""
    return storage.join(work, f"part-{part:05d}.json")


def sidecar_url(work: str, shard: int) -> str:
    """Return the URL of a shard's sidecar, which exists once the shard is finished."""
    return storage.join(work, f"shard-{shard:05d}.json")


def checked(image: bytes, short_side: int, quality: int, max_pixels: int = DECODING.max_pixels) -> bytes:
    """Decode `image` fully; return it as it is, or as an upright JPEG whose short side is `short_side` if it is larger.

    Shrinks with antialiasing, bilinear as torchvision's Resize, with the same rounding. Raises DamagedImageError.
    """
    pixels_CHW = decode(image, how=Decoding(max_pixels))
    height, width = pixels_CHW.shape[1:]
    if not 0 < short_side < min(height, width):
        return image
    from PIL import Image

    size = (max(short_side, short_side * width // height), max(short_side, short_side * height // width))
    out = io.BytesIO()
    picture = Image.fromarray(pixels_CHW.permute(1, 2, 0).contiguous().numpy())
    picture.resize(size, Image.Resampling.BILINEAR).save(out, "JPEG", quality=quality)
    return out.getvalue()


class _Row(NamedTuple):
    label: int
    name: str
    image: memoryview


def _pack(key: float, label: int, name: str, image: bytes) -> bytes:
    encoded = name.encode("utf-8", "replace")  # names of local files may hold any bytes
    fields = _FIELDS.pack(key, label, len(encoded), len(image))
    return b"".join((fields, _CRC.pack(_crc(fields, encoded, image)), encoded, image))


def _crc(*parts: Any) -> int:
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value


def _gather(unit: ShardUnit) -> Iterator[tuple[float, _Row]]:
    """Read the shard's range of every part; rows in the order of parts."""

    def read(place: tuple[int, int, int]) -> bytes:
        part, start, stop = place
        try:
            return storage.read_range(blob_url(unit.work, part), start, stop - start)
        except FileNotFoundError as error:
            raise UserError(f"{error.filename} is gone: {not_shared(unit.work)}") from None

    if storage.is_remote(unit.work):
        with ThreadPoolExecutor(THREADS) as pool:
            chunks = list(pool.map(read, unit.ranges))
    else:
        chunks = list(map(read, unit.ranges))
    for (part, start, _), chunk in zip(unit.ranges, chunks, strict=True):
        view, at = memoryview(chunk), 0
        while at < len(view):
            try:
                key, label, name_bytes, image_bytes = _FIELDS.unpack_from(view, at)
                (crc,) = _CRC.unpack_from(view, at + _FIELDS.size)
                name_at = at + _FIELDS.size + _CRC.size
                image_at = name_at + name_bytes
                stop = image_at + image_bytes
                if stop > len(view) or crc != _crc(
                    view[at : at + _FIELDS.size], view[name_at:image_at], view[image_at:stop]
                ):
                    raise ValueError
            except (struct.error, ValueError):
                raise DamagedDataError(
                    f"{blob_url(unit.work, part)} has changed since it was written, at byte {start + at:,}; remove "
                    f"{index_url(unit.work, part)} and start again: this part is made anew"
                ) from None
            yield key, _Row(label, bytes(view[name_at:image_at]).decode(), view[image_at:stop])
            at = stop


def not_shared(work: str) -> str:
    """Return the remedy if one node does not see what another one wrote."""
    return f"on several nodes --target must be a folder or URL that all of them see, such as s3://bucket/set ({work})"


def schema(classes: tuple[str, ...]) -> Any:
    """Return the Arrow schema of a shard, with class names in the form of Hugging Face datasets."""
    import pyarrow as pa

    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(classes), "_type": "ClassLabel"},
        "id": {"dtype": "int64", "_type": "Value"},
    }
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = [("image", image), ("label", pa.int64()), ("id", pa.int64())]
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _write_parquet(unit: ShardUnit, rows: list[_Row]) -> bytes:
    """Return the bytes of the file. It has no statistics on image bytes: they would cost a third of the reading speed
    and have no use."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    columns = schema(unit.classes)
    options: dict[str, Any] = {"compression": "NONE", "use_dictionary": False, "write_statistics": ["label", "id"]}
    with pq.ParquetWriter(sink, columns, **options) as writer:
        for start in range(0, unit.rows, unit.block_rows):
            block = rows[start : start + unit.block_rows]
            image = pa.StructArray.from_arrays(
                [
                    pa.array([bytes(row.image) for row in block], pa.binary()),
                    pa.array([row.name for row in block], pa.string()),
                ],
                fields=list(columns.field("image").type),
            )
            label = pa.array([row.label for row in block], pa.int64())
            ids = pa.array(range(unit.first_id + start, unit.first_id + start + len(block)), pa.int64())
            writer.write_table(pa.table([image, label, ids], schema=columns), row_group_size=len(block))
    return sink.getvalue().to_pybytes()


def _describe(file: str, data: bytes) -> Shard:
    """Describe a file from its footer: its blocks, each with the bytes from its first column chunk to its last."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(io.BytesIO(data))
    blocks = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [group.column(column) for column in range(group.num_columns)]
        start = min(chunk.data_page_offset for chunk in chunks)  # without dictionaries the first page is a data page
        stop = max(chunk.data_page_offset + chunk.total_compressed_size for chunk in chunks)
        sha256 = hashlib.sha256(memoryview(data)[start:stop]).hexdigest()
        blocks.append(Block(start, stop - start, group.num_rows, sha256))
    return Shard(file, metadata.num_rows, len(data), hashlib.sha256(data).hexdigest(), tuple(blocks))


def _read_commit(url: str, build: Callable[[Any], Any]) -> Any:
    """Return `build(the JSON at url)`; None if it is missing or damaged, so that its unit is run again."""
    try:
        return build(json.loads(storage.read_bytes(url)))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _shard_of(value: list[Any]) -> Shard:
    shard = Shard(*value)
    return shard._replace(blocks=tuple(Block(*block) for block in shard.blocks))
