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
from safetensors.torch import load_file, save_file
from tiny_run import cpu, tiny_config, tiny_data

from mimkd_ray import storage
from mimkd_ray.config import Config, DataConfig
from mimkd_ray.data.sources.data_set import Data, open_data
from mimkd_ray.errors import UserError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.run_lock import held
from mimkd_ray.train import trained_teacher
from mimkd_ray.train.distributed import Context
from mimkd_ray.train.job import obtain_teacher, run_job
from mimkd_ray.train.records import same_inputs
from mimkd_ray.train.records.outcomes import claim
from mimkd_ray.train.records.same_inputs import check_same_labels


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


def test_files_of_one_name_in_two_splits_are_told_apart(tmp_path: Path) -> None:
    run, folder = str(tmp_path / "run"), tmp_path / "set"
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        pq.write_table(table(), folder / split / "0000.parquet", use_dictionary=False, compression=None)
    check_same_labels(open_data(DataConfig(root=str(folder))), run)
    others = table(pa.array(LABELS.to_pylist()[::-1]))
    pq.write_table(others, folder / "train" / "0000.parquet", use_dictionary=False, compression=None)
    with pytest.raises(UserError, match=r"other labels in train/0000\.parquet \(1 of 2 files\)"):
        check_same_labels(open_data(DataConfig(root=str(folder))), run)


def test_sets_whose_digest_covers_labels_are_not_read(tmp_path: Path) -> None:
    check_same_labels(tiny_data(), str(tmp_path))
    assert not list(tmp_path.iterdir())
    assert len(IMAGES) == len(LABELS)


def test_other_names_of_a_teachers_classes_are_refused(tmp_path: Path) -> None:
    """Of a data set whose digest covers its labels; the names in another order would change what logits mean."""
    teacher, run, file = tmp_path / "teacher.pth", str(tmp_path / "run"), tmp_path / "names.txt"
    torch.save(build_model("cifar/resnet8", 12).state_dict(), teacher)
    names = [str(number) for number in range(12)]
    config = tiny_config(teacher={"weights": str(teacher), "classes": str(file)})
    for _ in range(2):
        file.write_text("\n".join(names))
        obtain_teacher(config, tiny_data(), cpu(), run)
    file.write_text("\n".join(names[::-1]))
    with pytest.raises(UserError, match=r"begun with other labels in .*names\.txt \(1 of 1 files\): put the old"):
        obtain_teacher(config, tiny_data(), cpu(), run)


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


def test_another_teacher_in_the_place_of_the_trained_one_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny_config(teacher={"train": True, "epochs": 1})
    obtain_teacher(config, tiny_data(), cpu(), str(run))
    (file,) = tmp_path.glob("teachers/*/student.safetensors")
    state = load_file(file)
    save_file({name: value + 1 if value.is_floating_point() else value for name, value in state.items()}, file)
    with pytest.raises(UserError, match=r"a teacher of other weights .*student\.safetensors: put the old file back"):
        obtain_teacher(config, tiny_data(), cpu(), str(run))


def test_students_of_a_comparison_start_from_one_file(tmp_path: Path) -> None:
    file, run = tmp_path / "start.pth", str(tmp_path / "run")
    config = tiny_config(student={"weights": str(file)}, compare={"seeds": 1, "arms": ("alone",)}, train={"epochs": 1})
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        torch.save(build_model("cifar/resnet8_w4", 10).state_dict(), file)
        if seed:
            Path(run, "result.json").unlink()
            with pytest.raises(UserError, match=r"begun with a student of other weights .* from .*start\.pth: put the"):
                run_job(config, cpu(), run)
        else:
            run_job(config, cpu(), run)


def test_a_directory_in_which_nothing_was_trained_takes_another_config(tmp_path: Path) -> None:
    run, first = str(tmp_path), tiny_config()
    with held(run):
        claim(first, run)
        for name in ("labels.json", "teacher.json", "student.json", "loggers.json", "calibrations/a.safetensors"):
            storage.write_bytes(f"{run}/{name}", b"{}")
    with held(run):
        claim(first, run)
        assert len(list(tmp_path.iterdir())) == 7
        claim(replace(first, optim=replace(first.optim, lr=0.5)), run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibrations", "config.json"]


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


def test_runs_share_a_teacher_and_its_figures_only_with_the_same_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = tmp_path / "teacher.pth", tmp_path / "set"
    torch.save(build_model("cifar/resnet8", 4).state_dict(), file)
    places, measured = list[str](), list[int]()

    def train_on(own: Config, images: Data, teacher: None, context: Context, place: str) -> None:
        places.append(place)
        raise UserError("not trained here")

    monkeypatch.setattr(trained_teacher, "train_on", train_on)
    for run, labels in (("a", LABELS), ("b", LABELS), ("c", pa.array(LABELS.to_pylist()[::-1]))):
        data = write(folder, labels)
        config = tiny_config(data={"root": str(folder), "subset": 0}, teacher={"weights": str(file)})
        obtain_teacher(config, data, cpu(), str(tmp_path / run))
        measured.append(len(list(tmp_path.glob("evaluations/*"))))
        with pytest.raises(UserError, match="not trained here"):
            obtain_teacher(
                replace(config, teacher=replace(config.teacher, train=True, weights="random")),
                *(data, cpu(), str(tmp_path / run)),
            )
    assert measured == [1, 1, 2]
    assert places[0] == places[1] != places[2]
