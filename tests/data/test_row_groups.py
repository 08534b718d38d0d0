"""Labels out of Arrow columns against Arrow's own conversion."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from mimkd_ray.data.row_groups import label_array
from mimkd_ray.errors import UserError


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
    with pytest.raises(UserError, match="1 of 2 rows have no label"):
        label_array(pa.chunked_array([pa.array([4, None])]), "a file")
