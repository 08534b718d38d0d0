"""Places found in a column chunk against Arrow's own reading of it."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimkd_ray.data.pages import find_values
from mimkd_ray.data.row_groups import chunk_span

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _file(column: pa.Array | pa.ChunkedArray, **options: object) -> bytes:
    out = io.BytesIO()
    schema = pa.schema([pa.field("image", column.type, nullable=not options.pop("required", False))])
    settings = {"compression": "none", "use_dictionary": False} | options
    pq.write_table(pa.table([column], schema=schema), out, **settings)
    return out.getvalue()


def _found(file: bytes, rows: int) -> list[bytes] | None:
    """The values of the first row group's first column, by their places."""
    metadata = pq.read_metadata(io.BytesIO(file))
    start, end = chunk_span(metadata.row_group(0).column(0))
    chunk = memoryview(file)[start:end]
    places = find_values(chunk, rows, metadata.schema.column(0).max_definition_level > 0)
    if places is None:
        return None
    assert places.offsets.dtype == places.lengths.dtype == np.int64
    return [bytes(chunk[o : o + n]) for o, n in zip(places.offsets.tolist(), places.lengths.tolist(), strict=True)]


@settings(deadline=None)
@given(
    values=st.lists(st.binary(max_size=300), min_size=1, max_size=60),
    page=st.sampled_from([1, 100, 2000, 10**6]),
    kind=st.sampled_from(["struct", "binary", "required"]),
    statistics=st.booleans(),
    checksum=st.booleans(),
)
def test_plain_values_are_found(values: list[bytes], page: int, kind: str, statistics: bool, checksum: bool) -> None:
    column = pa.array([{"bytes": v, "path": None} for v in values], STRUCT) if kind == "struct" else pa.array(values)
    file = _file(
        column,
        data_page_size=page,
        write_batch_size=7,
        required=kind == "required",
        write_statistics=statistics,
        write_page_checksum=checksum,
    )
    assert _found(file, len(values)) == values


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "snappy"},
        {"use_dictionary": True},
        {"data_page_version": "2.0"},
        {"use_dictionary": False, "column_encoding": {"image": "DELTA_LENGTH_BYTE_ARRAY"}},
    ],
)
def test_other_forms_are_left_alone(options: dict[str, object]) -> None:
    values = [bytes([i]) * 50 for i in range(20)]
    assert _found(_file(pa.array(values), **options), 20) is None


def test_values_that_are_missing_are_noticed() -> None:
    assert _found(_file(pa.array([b"a", None, b"c"])), 3) is None
    assert _found(_file(pa.array([{"bytes": None, "path": "x"}], STRUCT)), 1) is None


def test_a_wrong_number_of_rows_is_noticed() -> None:
    file = _file(pa.array([b"abc"] * 10))
    assert _found(file, 9) is None
    assert _found(file, 11) is None


@given(st.binary(max_size=200))
def test_noise_is_no_column(noise: bytes) -> None:
    found = find_values(memoryview(noise), 3, True)
    assert found is None or np.all(found.offsets + found.lengths <= len(noise))


def test_every_cut_is_noticed() -> None:
    file = _file(pa.array([bytes([i]) * 9 for i in range(8)]), data_page_size=1, write_batch_size=2)
    start, end = chunk_span(pq.read_metadata(io.BytesIO(file)).row_group(0).column(0))
    for cut in range(start, end):
        assert find_values(memoryview(file)[start:cut], 8, True) is None
