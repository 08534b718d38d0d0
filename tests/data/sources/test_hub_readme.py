"""Folders of Hugging Face data sets, whose README.md says which files are which split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mimkd_ray.config import DataConfig
from mimkd_ray.config.jobs.prepare import PrepareConfig
from mimkd_ray.data.prepare.make_shards import open_origin
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.data.sources.hub_readme import declared_files
from mimkd_ray.errors import UserError

README = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: "plain/part-a-*.parquet"
  - split: test
    path: ["plain/part-b-*.parquet"]
- config_name: other
  data_files: x/*.parquet
---
# A set
"""


def write(root: Path, readme: str) -> DataConfig:
    for name, rows in {"part-a-0": 3, "part-a-1": 2, "part-b-0": 4}.items():
        table = pa.table({"image": [{"bytes": b"x", "path": None}] * rows, "label": list(range(rows))})
        (root / "plain").mkdir(exist_ok=True)
        pq.write_table(table, root / "plain" / f"{name}.parquet")
    (root / "README.md").write_text(readme)
    return DataConfig(root=str(root), num_classes=4)


@pytest.mark.parametrize(
    "readme",
    [
        README,
        '---\nconfigs:\n- config_name: only\n  data_files: {train: "plain/part-a*", test: "plain/part-b*"}\n---\n',
    ],
)
def test_files_are_those_that_the_readme_names(tmp_path: Path, readme: str) -> None:
    pytest.importorskip("yaml")
    data = open_data(write(tmp_path, readme))
    assert (data.train.num_rows, data.val.num_rows) == (5, 4)
    assert data.train.labels().tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(("pattern", "rows"), [("*.parquet", 9), ("**/*.parquet", 5)])
def test_a_star_stays_in_its_folder(tmp_path: Path, pattern: str, rows: int) -> None:
    config = write(tmp_path, f"---\nconfigs:\n- data_files: {{train: 'plain/{pattern}'}}\n---\n")
    (tmp_path / "plain" / "more").mkdir()
    (tmp_path / "plain" / "part-b-0.parquet").rename(tmp_path / "plain" / "more" / "part-b-0.parquet")
    assert open_data(replace(config, val_split="train")).train.num_rows == 14 - rows


def test_a_pattern_that_nobody_can_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"README.md: its pattern 'plain/\*\*a' of files cannot be read: .*; mend it"):
        open_data(write(tmp_path, "---\nconfigs:\n- data_files: 'plain/**a'\n---\n"))


def test_preparation_takes_them_too(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    write(tmp_path, README)
    origin = open_origin(PrepareConfig(source=str(tmp_path), target=str(tmp_path.parent / "set"), split="test"))
    assert origin.labels is not None
    assert [labels.tolist() for labels in origin.labels] == [[0, 1, 2, 3]]


def test_several_configs_without_a_default_are_named(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    config = write(
        tmp_path, README.replace("config_name: default", "config_name: plain").replace("x/*", "plain/part-a-0")
    )
    with pytest.raises(
        UserError, match=r"plain/train \(in README.md\), plain/test .*, other/train .*--data.train-split"
    ):
        open_data(config)
    data = open_data(replace(config, train_split="other/train", val_split="plain/test"))
    assert (data.train.num_rows, data.val.num_rows) == (3, 4)


def test_a_readme_that_says_nothing_changes_nothing(tmp_path: Path) -> None:
    for readme in ("# A set\n", "---\nlicense: mit\n---\n", "---\nconfigs: []\n"):
        with pytest.raises(UserError, match="has no training split 'train'"):
            open_data(write(tmp_path, readme))


def test_metadata_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    with pytest.raises(UserError, match=r"README.md: its metadata cannot be read .*mend the lines between ---"):
        open_data(write(tmp_path, "---\nconfigs: [\n---\n"))


@pytest.mark.parametrize("lines", ["Some words", "", "# a comment", "configs:"])
def test_a_readme_without_metadata_says_nothing(tmp_path: Path, lines: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{lines}\n---\n# A set\n")
    assert declared_files(str(tmp_path)) == {}
