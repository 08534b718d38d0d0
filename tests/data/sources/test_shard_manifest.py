"""The manifest of a prepared split: it comes back as it was written, and a wrong one says what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mimkd_ray.data.sources.shard_manifest import Block, Manifest, Shard, content_digest, read_manifest, write_manifest
from mimkd_ray.errors import UserError

SHARDS = (
    Shard("val-00000-of-00002.parquet", 8, 500, "aa" * 32, (Block(4, 100, 4, "01" * 32), Block(104, 90, 4, "02" * 32))),
    Shard("val-00001-of-00002.parquet", 3, 300, "bb" * 32, (Block(4, 80, 3, "03" * 32),)),
)
MANIFEST = Manifest(
    split="val",
    rows=11,
    block_rows=4,
    classes=("cat", "dög"),
    digest=content_digest(("cat", "dög"), SHARDS),
    damaged=2,
    settings={"seed": 3, "source": "here"},
    shards=SHARDS,
)


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_manifest(str(tmp_path), "val") is None
    write_manifest(str(tmp_path), MANIFEST)
    assert read_manifest(str(tmp_path), "val") == MANIFEST
    assert [file.name for file in tmp_path.iterdir()] == ["val.manifest.json"]
    assert read_manifest(str(tmp_path), "train") is None


def test_the_digest_changes_with_classes_rows_and_bytes() -> None:
    changed = [
        content_digest(("cat", "dog"), SHARDS),
        content_digest(MANIFEST.classes, SHARDS[:1]),
        content_digest(MANIFEST.classes, (SHARDS[0]._replace(sha256="ac" * 32), SHARDS[1])),
        content_digest(MANIFEST.classes, SHARDS[::-1]),
    ]
    assert len({MANIFEST.digest, *changed}) == 5
    assert len(MANIFEST.digest) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 12}, "3 blocks do not hold 12 rows in blocks of 4"),
        ({"block_rows": 3}, "3 blocks do not hold 11 rows in blocks of 3"),
        ({"classes": ["cat", "dog"]}, f"its digest is {MANIFEST.digest}, and its content has"),
        ({"version": 2}, "version 2, this program reads version 1"),
        ({"split": "train"}, "it is of split 'train'"),
        ({"shards": 5}, "not iterable"),
    ],
)
def test_a_changed_manifest_says_what_is_wrong(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_manifest(str(tmp_path), MANIFEST)
    file = tmp_path / "val.manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError) as caught:
        read_manifest(str(tmp_path), "val")
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "prepare the set anew" in str(caught.value)


@pytest.mark.parametrize("text", ["", '{"version": 1', "[]", '{"version": 1}'])
def test_a_manifest_that_is_cut_short_is_a_user_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "val.manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"val\.manifest\.json: the manifest"):
        read_manifest(str(tmp_path), "val")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Block(50, 90, 4, "02" * 32), "90 bytes at 50"),  # over the one before
        (Block(104, 400, 4, "02" * 32), "the file of 500 bytes"),
        (Block(104, 0, 4, "02" * 32), "0 bytes at 104"),
    ],
)
def test_blocks_lie_in_their_file_one_behind_the_other(block: Block, message: str) -> None:
    shards = (SHARDS[0]._replace(blocks=(SHARDS[0].blocks[0], block)), SHARDS[1])
    with pytest.raises(ValueError, match=message):
        replace(MANIFEST, shards=shards, digest=content_digest(MANIFEST.classes, shards))
    with pytest.raises(ValueError, match="do not hold its 7 rows"):
        replace(MANIFEST, shards=(SHARDS[0]._replace(rows=7), SHARDS[1]))
