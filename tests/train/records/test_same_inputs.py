"""Between two starts the labels, or the teacher's file, are replaced by others of the same size."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bad_files import IMAGES, LABELS, table
from tiny_run import cpu, tiny_config, tiny_data

from mimkd_ray.config import DataConfig
from mimkd_ray.data.sources.data_set import Data, open_data
from mimkd_ray.errors import UserError
from mimkd_ray.models.zoo import build_model
from mimkd_ray.train.records import same_inputs
from mimkd_ray.train.records.same_inputs import check_same_labels
from mimkd_ray.train.worker import obtain_teacher


def write(folder: Path, labels: pa.Array = LABELS) -> Data:
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation"):
        pq.write_table(
            table(labels), folder / f"{split}-00000-of-00001.parquet", use_dictionary=False, compression=None
        )
    return open_data(DataConfig(root=str(folder)))


def test_other_labels_of_the_same_size_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, folder = str(tmp_path / "run"), tmp_path / "set"
    first = write(folder)
    files = {path: (path.read_bytes(), path.stat()) for path in folder.iterdir()}
    check_same_labels(first, run)
    with monkeypatch.context() as patch:
        patch.setattr(same_inputs.ParquetSource, "file_labels", lambda *_: pytest.fail("nothing has been written"))
        check_same_labels(open_data(DataConfig(root=str(folder))), run)
    other = write(folder, pa.array(LABELS.to_pylist()[::-1]))
    for path, (data, status) in files.items():
        assert path.stat().st_size == len(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a copy keeps it
    assert other.digest == first.digest
    with pytest.raises(UserError, match=r"begun with other labels in train-00000-of-00001\.parquet.* \(2 of 2 files\)"):
        check_same_labels(other, run)
    for path, (data, _) in files.items():
        path.write_bytes(data)
    check_same_labels(open_data(DataConfig(root=str(folder))), run)


def test_sets_whose_digest_covers_labels_are_not_read(tmp_path: Path) -> None:
    check_same_labels(tiny_data(), str(tmp_path))
    assert not list(tmp_path.iterdir())
    assert len(IMAGES) == len(LABELS)


def test_another_teacher_under_the_same_name_is_refused(tmp_path: Path) -> None:
    file, run = tmp_path / "teacher.pth", str(tmp_path / "run")
    torch.save(build_model("cifar/resnet8", 10).state_dict(), file)
    config = tiny_config(teacher={"weights": str(file)})
    obtain_teacher(config, tiny_data(), cpu(), run)
    obtain_teacher(config, tiny_data(), cpu(), run)
    torch.manual_seed(1)  # building the teacher seeds torch, too
    torch.save(build_model("cifar/resnet8", 10).state_dict(), file)
    with pytest.raises(UserError, match=r"begun with a teacher of other weights \(sha256 .*teacher\.pth: put the old"):
        obtain_teacher(config, tiny_data(), cpu(), run)


def test_a_teacher_that_was_refused_may_be_another_one(tmp_path: Path) -> None:
    file, run = tmp_path / "teacher.pth", str(tmp_path / "run")
    torch.save(build_model("cifar/resnet8", 10).state_dict(), file)
    config = tiny_config(teacher={"weights": str(file), "expect_top1": 90.0})
    with pytest.raises(UserError, match=r"90\.00 % was expected"):
        obtain_teacher(config, tiny_data(), cpu(), run)
    torch.save(build_model("cifar/resnet8", 10).state_dict(), file)
    with pytest.raises(UserError, match=r"90\.00 % was expected"):
        obtain_teacher(config, tiny_data(), cpu(), run)
    obtain_teacher(replace(config, teacher=replace(config.teacher, expect_top1=0.0)), tiny_data(), cpu(), run)
