"""Parquet columns as others name and type them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_sets import encode, images, pixels
from prepare_sets import config, table

from mimkd_ray.config import DataConfig
from mimkd_ray.data.augment.decode import decode
from mimkd_ray.data.prepare.make_shards import prepare
from mimkd_ray.data.sources import data_set
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.data.sources.source import SubsetSource
from mimkd_ray.errors import UserError

FILES = images(6)
KIND = pa.struct({"bytes": pa.binary(), "path": pa.string()})
STRUCT = pa.array([{"bytes": file, "path": None} for file in FILES], KIND)
NUMBERS = [2, 0, 1, 0, 2, 1]
WORDS = ["dog", "ant", "bee", "ant", "dog", "bee"]


def write(root: Path, columns: dict[str, Any], features: dict[str, Any] | None = None) -> str:
    made = pa.table(columns)
    if features:
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    for split in ("train", "test"):
        pq.write_table(made, root / f"{split}-0.parquet", row_group_size=4)
    return str(root)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "img, fine_label": ({"img": STRUCT, "fine_label": NUMBERS, "coarse_label": [0] * 6}, {}),
    "jpg, cls": ({"__key__": ["k"] * 6, "jpg": pa.array(FILES), "cls": pa.array(NUMBERS, pa.uint8())}, {}),
    "labels of 32 bits": ({"image": pa.array(FILES, pa.large_binary()), "labels": pa.array(NUMBERS, pa.int32())}, {}),
    "by type": ({"scan": pa.array(FILES), "grade": NUMBERS, "id": range(6), "note": ["x"] * 6}, {}),
    "text": ({"image": STRUCT, "label": WORDS}, {}),
    "text with a dictionary": ({"image": STRUCT, "label": pa.array(WORDS).dictionary_encode()}, {}),
    "text in views": ({"image": pa.array(FILES, pa.binary_view()), "label": pa.array(WORDS, pa.string_view())}, {}),
    "floats": ({"image": STRUCT, "target": [float(number) for number in NUMBERS]}, {}),
    "named": (
        {"a": pa.array(FILES), "b": pa.array([b""] * 6), "x": NUMBERS, "y": [0] * 6},
        {"image_column": "a", "label_column": "x"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_columns_of_other_names_and_types(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    columns, options = CASES[case]
    root = write(tmp_path, columns)
    data = open_data(DataConfig(root=root, **options))
    for source in (data.train, data.val):
        rows = source.read(range(6))
        assert [row.label for row in rows] == NUMBERS == source.labels().tolist()
        assert [bytes(row.image) for row in rows] == FILES
        assert source.label_range() == (0, 2)
    assert data.classes == (("ant", "bee", "dog") if "text" in case else ("0", "1", "2"))
    said = "split 'train' has its images in column 'scan' and its labels in 'grade' (--data.image-column"
    assert (said in caplog.text) == (case == "by type")
    assert bool(caplog.records) == (case != "named")
    manifest = prepare(config(tmp_path, tmp_path.parent / f"{tmp_path.name}-made", **options))
    assert manifest.classes == data.classes
    made = table(tmp_path.parent / f"{tmp_path.name}-made", manifest)
    assert {row["image"]["bytes"]: row["label"] for row in made} == dict(zip(FILES, NUMBERS, strict=True))


def test_the_files_own_metadata_decides(tmp_path: Path) -> None:
    features = {"scan": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": ["a", "b", "c"]}}
    root = write(tmp_path, {"scan": STRUCT, "mask": STRUCT, "kind": NUMBERS, "age": [1] * 6}, features)
    data = open_data(DataConfig(root=root))
    assert data.classes == ("a", "b", "c")
    assert data.train.labels().tolist() == NUMBERS


@pytest.mark.parametrize(("option", "value"), [("image_column", "label"), ("label_column", "nothing")])
def test_a_named_column_that_does_not_fit(tmp_path: Path, option: str, value: str) -> None:
    root = write(tmp_path, {"image": STRUCT, "label": NUMBERS})
    said = rf"--data\.{option.replace('_', '-')} {value} is not .*the columns are image .* label \(int64\)"
    with pytest.raises(UserError, match=said):
        open_data(DataConfig(root=root, **{option: value}))


@pytest.mark.parametrize(
    "labels",
    [
        [0, None, 1, None, 1, 0],
        [0, -1, 1, -1, 1, 0],
        [0.0, float("nan"), 1.0, None, 1.0, 0.0],  # as pandas writes integers with None among them
        ["a", None, "b", None, "b", "a"],
    ],
    ids=str,
)
def test_test_rows_without_a_label_are_left_out(
    tmp_path: Path, labels: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    full = ["a", "b"] * 3 if "a" in labels else [0, 1] * 3
    write(tmp_path, {"image": STRUCT, "label": full})
    pq.write_table(pa.table({"image": STRUCT, "label": labels}), tmp_path / "test-0.parquet")
    data = open_data(DataConfig(root=str(tmp_path)))
    assert [(row.id, row.label) for row in data.val.read(range(4))] == [(0, 0), (2, 1), (4, 1), (5, 0)]
    assert "2 of 6 validation rows have no label" in caplog.text
    caplog.clear()
    of_labels = SubsetSource(data.val.parent, [0, 2])
    assert data_set._labelled(DataConfig(labels="partial"), of_labels, 2).num_rows == 2
    assert not caplog.records, "none of these lacks one"
    pq.write_table(pa.table({"image": STRUCT, "label": labels}), tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match="the training set has labels down to -1"):
        open_data(DataConfig(root=str(tmp_path)))
    nothing = pa.array([None] * 6, pa.table({"x": full})["x"].type)
    write(tmp_path, {"image": STRUCT, "label": full})
    pq.write_table(pa.table({"image": STRUCT, "label": nothing}), tmp_path / "test-0.parquet")
    with pytest.raises(UserError, match=r"the validation set has labels down to -1.*hidden"):
        open_data(DataConfig(root=str(tmp_path)))


def test_labels_of_two_values_and_of_none(tmp_path: Path) -> None:
    root = write(tmp_path, {"image": STRUCT, "label": [True, False] * 3})
    assert open_data(DataConfig(root=root)).train.labels().tolist() == [1, 0] * 3
    root = write(tmp_path, {"image": STRUCT, "label": [0.5, 1.0] * 3})
    with pytest.raises(UserError, match=r"labels of type double are no class numbers: .*0\.5"):
        open_data(DataConfig(root=root))


@pytest.mark.parametrize(
    ("labels", "known"),
    [
        ([10**12, 0, 1, 0, 1, 0], [-1, 0, 1, 0, 1, 0]),
        (pa.array([2**64 - 1, 0, 1, 0, 1, 0], pa.uint64()), [-1, 0, 1, 0, 1, 0]),
        ([0.5, 0.0, float("inf"), 1e300, float("nan"), 1.0], [-1, 0, -1, -1, -1, 1]),
        ([0.25] * 6, [-1] * 6),
    ],
    ids=str,
)
def test_labels_that_nobody_asked_for_need_not_be_class_numbers(tmp_path: Path, labels: Any, known: list[int]) -> None:
    root = write(tmp_path, {"image": STRUCT, "label": labels})
    data = open_data(DataConfig(root=root, labels="none", num_classes=2))
    for source in (data.train, data.val.parent if isinstance(data.val, SubsetSource) else data.val):
        assert source.labels().tolist() == [row.label for row in source.read(range(6))] == known
    with pytest.raises(UserError, match="class number"):
        open_data(DataConfig(root=root))


def test_a_text_of_validation_that_is_no_class(tmp_path: Path) -> None:
    write(tmp_path, {"image": STRUCT, "label": WORDS})
    pq.write_table(pa.table({"image": STRUCT, "label": ["emu", *WORDS[1:]]}), tmp_path / "test-0.parquet")
    with pytest.raises(UserError, match=r"1 of 6 labels are none of the 3 classes of the training set.*'emu'"):
        open_data(DataConfig(root=str(tmp_path)))
    data = open_data(DataConfig(root=str(tmp_path), labels="none"))
    assert sorted(data.val.labels().tolist()) == [0, 0, 1, 1, 2]


def test_images_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    data = encode(pixels(7))
    for name in ("a.png", "b.png", "c.txt"):
        (tmp_path / "pictures" / name).write_bytes(data)
    paths = ["pictures/a.png", str(tmp_path / "pictures" / "b.png"), "pictures/c.txt", "gone.png", None, "x.png"]
    rows = [{"bytes": FILES[5] if path == "x.png" else None, "path": path} for path in paths]
    root = write(tmp_path, {"image": pa.array(rows, KIND), "label": NUMBERS})
    read = open_data(DataConfig(root=root)).train.read(range(6))
    assert [bytes(row.image) for row in read] == [data, data, b"", b"", b"", FILES[5]]
    assert decode(read[0].image).shape == (3, 12, 16)
    manifest = prepare(config(tmp_path, tmp_path.parent / "beside-made"))
    assert (manifest.rows, manifest.damaged) == (3, 3)
