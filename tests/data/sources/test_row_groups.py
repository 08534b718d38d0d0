"""Labels and images of row groups against Arrow's own conversion."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimkd_ray.data.sources.columns import Columns, label_array
from mimkd_ray.data.sources.row_groups import HEAD_BYTES, find_images, read_row_group
from mimkd_ray.data.store.stored_block import StoredBlock
from mimkd_ray.errors import UserError

PLAIN = {"compression": "none", "use_dictionary": False}


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.uint8(), pa.date32()])
def test_labels_of_any_kind_of_integer(kind: pa.DataType) -> None:
    stored = pa.array([3, 0, 7, 5, 1], pa.int32()).cast(kind)
    column = pa.chunked_array([stored[:2], stored[2:2], stored[2:]])
    got = label_array(column, "a file")
    assert got.dtype == np.int64
    assert got.tolist() == [3, 0, 7, 5, 1]
    assert label_array(column[:0], "a file").tolist() == []


def test_integers_do_without_pandas() -> None:
    def to_numpy() -> None:
        raise AssertionError("it imports pandas, which takes a second")

    column = pa.chunked_array([pa.array([4, 2])])
    kept = SimpleNamespace(null_count=0, type=column.type, combine_chunks=column.combine_chunks, to_numpy=to_numpy)
    assert label_array(kept, "a file").tolist() == [4, 2]


def test_a_row_without_a_label() -> None:
    for kind in (pa.int64(), pa.uint8()):
        assert label_array(pa.chunked_array([pa.array([4, None], kind)]), "a file").tolist() == [4, -1]
    text = pa.chunked_array([pa.array(["b", None, "a"]).dictionary_encode()])
    assert label_array(text, "a file", ("a", "b")).tolist() == [1, -1, 0]
    with pytest.raises(UserError, match=r"1 of 3 labels are none of the 1 classes .* the first is 'b'"):
        label_array(text, "a file", ("a",))


def _rows(block: StoredBlock) -> list[bytes]:
    images = block.images(lambda path, identity: memoryview(Path(path).read_bytes()))
    return [bytes(images[block.row(row)[0]]) for row in range(len(block.labels))]


def _column(values: list[bytes | None], kind: str) -> pa.Array:
    if kind == "struct":
        return pa.array(
            [{"bytes": value, "path": "x"} for value in values], pa.struct({"bytes": pa.binary(), "path": pa.string()})
        )
    return pa.array(values, pa.large_binary() if kind == "large" else pa.binary())


def _read(path: Path, group: int, kind: str, in_place: bool) -> StoredBlock:
    column = Columns(field="bytes" if kind == "struct" else "", has_path=False)
    return read_row_group(str(path), path.stat().st_size, group, column, None, 0, in_place)


@settings(deadline=None, max_examples=150)
@given(
    # Few distinct bytes, and short heads: an image is often found in a place that is not its own.
    values=st.lists(
        st.one_of(st.none(), st.binary(max_size=300), st.text("ab", max_size=150).map(str.encode)),
        min_size=1,
        max_size=40,
    ),
    page=st.sampled_from([1, 100, 2000, 10**6]),
    kind=st.sampled_from(["struct", "binary", "large"]),
    in_place=st.booleans(),
    options=st.sampled_from(
        [
            PLAIN,
            PLAIN | {"data_page_version": "2.0"},
            PLAIN | {"column_encoding": {"image": "DELTA_LENGTH_BYTE_ARRAY"}},
            PLAIN | {"write_page_checksum": True},
            {"compression": "snappy"},
            {"compression": "none", "use_dictionary": True},
        ]
    ),
)
def test_images_are_arrows(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[bytes | None],
    page: int,
    kind: str,
    in_place: bool,
    options: dict[str, object],
) -> None:
    """In any form that Arrow writes, with images missing, and whether they are left in the file or not."""
    if kind == "struct" and "column_encoding" in options:
        options = PLAIN
    path = tmp_path_factory.mktemp("set") / "x.parquet"
    table = pa.table({"image": _column(values, kind), "label": pa.array(range(len(values)), pa.int64())})
    pq.write_table(table, path, row_group_size=15, data_page_size=page, write_batch_size=7, **options)
    found: list[bytes] = []
    for group in range(-(-len(values) // 15)):
        block = _read(path, group, kind, in_place)
        assert block.offsets.dtype == block.lengths.dtype == block.labels.dtype == np.int64
        found += _rows(block)
    assert found == [value or b"" for value in values]


@pytest.mark.parametrize("kind", ["struct", "binary", "large"])
@pytest.mark.parametrize(
    ("options", "stays"),
    [
        (PLAIN, True),
        (PLAIN | {"data_page_version": "2.0"}, True),
        ({"compression": "gzip", "use_dictionary": False}, False),
    ],
)
def test_uncompressed_images_stay_in_their_file(
    tmp_path: Path, kind: str, options: dict[str, object], stays: bool
) -> None:
    path = tmp_path / "x.parquet"
    values: list[bytes | None] = [bytes([number]) * 500 for number in range(8)]
    pq.write_table(pa.table({"image": _column(values, kind), "label": pa.array(range(8))}), path, **options)
    block = _read(path, 0, kind, in_place=True)
    assert (block.data is None) == stays
    assert block.path == (str(path) if stays else "")
    assert _rows(block) == values


def test_images_with_equal_heads_are_told_apart() -> None:
    """JPEG files of one camera begin alike."""
    head = b"h" * (HEAD_BYTES + 10)
    images = [head + b"one", head, head + b"three", b"", head]
    data = b"page" + b"----".join(images)
    places = find_images(data, StoredBlock.of(images, np.arange(5)))
    assert places is not None
    assert [data[place : place + len(image)] for place, image in zip(places.tolist(), images, strict=True)] == images
    assert places.tolist()[0] == 4


def test_an_image_that_is_not_there_is_noticed() -> None:
    images = [b"one", b"two", b"three"]
    block = StoredBlock.of(images, np.arange(3))
    assert find_images(b"one two three", block) is not None
    for data in (b"one two", b"one three", b"two one three", b"one two thre", b"", b"one two threE"):
        assert find_images(data, block) is None
