"""The headline study: its arms are losses of their own, its twin is cut as it says, and differences are paired."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from headline_arms import ARMS
from headline_runs import Pack, make_twin, protocol, twin
from headline_table import Study

from mimkd_ray.train.packed import check_members


def test_every_arm_is_a_loss_of_its_own_and_all_fit_one_pack(tmp_path: Path) -> None:
    assert len({json.dumps(loss, default=str) for loss in map(repr, ARMS.values())}) == len(ARMS)
    for base in (
        twin(tmp_path, tmp_path / "data", "teacher.safetensors", "cifar/resnet8", 30, 0),
        protocol(("resnet50", "shufflenet_v2"), "data", "teacher.safetensors", 20, 256, 0, 0.1),
    ):
        check_members(Pack("p", base, ARMS, tmp_path / base.recipe).members())


def _images(labels: list[int]) -> pa.Table:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    image = {"bytes": file.getvalue(), "path": ""}
    return pa.table({"image": [image] * len(labels), "label": labels, "row": list(range(len(labels)))})


def test_the_twin_takes_the_first_images_of_each_class(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    labels = [row % 3 for row in range(300)]
    pq.write_table(_images(labels), source / "train-00000-of-00002.parquet")
    pq.write_table(_images([0] * 9), source / "train-00001-of-00002.parquet")
    pq.write_table(_images([0, 1, 2] * 2000), source / "test-00000-of-00001.parquet")
    make_twin(source, tmp_path / "twin")
    rows = {
        split: pq.read_table(tmp_path / f"twin/{split}-00000.parquet")["row"].to_pylist()
        for split in ("train", "choose", "test")
    }
    assert rows["train"] == list(range(150))
    assert rows["choose"] == list(range(150, 270))
    assert rows["test"] == list(range(4000))


def test_differences_are_paired_by_seed_and_unfinished_arms_left_out(tmp_path: Path) -> None:
    base = twin(tmp_path, tmp_path / "data", "teacher.safetensors", "cifar/resnet8", 30, 0)
    packs = []
    for seed, (alone, queue) in enumerate([(20.0, 30.0), (22.0, 36.0), (24.0, None)]):
        own = replace(base, train=replace(base.train, seed=seed))
        pack = Pack("twin", own, {arm: ARMS[arm] for arm in ("alone", "queue")}, tmp_path)
        packs.append(pack)
        for arm, top1 in (("alone", alone), ("queue", queue)):
            if top1 is not None:
                folder = pack.folder(arm)
                folder.mkdir(parents=True)
                result = {"student": {"top1": top1 - 1}, "seconds": 4.0, "epochs": 30}
                (folder / "result.json").write_text(json.dumps(result))
                (folder / "test.json").write_text(json.dumps({"top1": top1}))
    study = Study.read(packs)
    assert study.top1("queue", "test") == {0: 30.0, 1: 36.0}
    assert study.difference("queue", "alone", "test") == "+12.00 ± 2.00"
    assert study.difference("queue", "queue", "test") == ""
    header, rows = study.rows()
    assert [row[:4] for row in rows] == [
        ["alone", "3", "21.00 ± 2.00", "22.00 ± 2.00"],
        ["queue", "2", "32.00 ± 4.24", "33.00 ± 4.24"],
    ]
    assert header[2:4] == ["held-out %", "test %"]
    study.write(tmp_path / "study.json", complete=False)
    assert json.loads((tmp_path / "study.json").read_text())["runs"]["queue"]["1"]["test"] == pytest.approx(36.0)
