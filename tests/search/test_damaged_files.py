"""Our own small files, damaged: each is named in one line, and what can be done without it is."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from tiny_run import cpu, run_tiny, tiny_config, tiny_data

from mimkd_ray.cli import report
from mimkd_ray.cli.runs import listing, shown
from mimkd_ray.config.form.json_form import to_dict
from mimkd_ray.errors import DamagedDataError, UserError
from mimkd_ray.json_files import parse, read_if_sound, read_json
from mimkd_ray.models.build_model import build_model
from mimkd_ray.search.summary import Clock
from mimkd_ray.search.trial_files import Table
from mimkd_ray.train.engine.restart import resume, state_of
from mimkd_ray.train.engine.student import lone_student
from mimkd_ray.train.records import checkpoint
from mimkd_ray.train.records.outcomes import find_result
from mimkd_ray.train.records.run_dir import read_metrics

DAMAGE = (b"", b"{", b"\xff\xfe{}", b"[]", b"null", b"[" * 100_000, b'{"other": 1}', b"\0" * 64)


@pytest.mark.parametrize("data", DAMAGE)
def test_damage_is_a_line_that_names_the_file(data: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        DamagedDataError, match=rf"a/b\.json \({len(data):,} bytes\) is damaged: .*; remove it"
    ) as raised:
        parse(data, "a/b.json", ("step",), "remove it")
    assert "\n" not in str(raised.value)
    file = tmp_path / "b.json"
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert read_if_sound(str(file), ("step",), "done again") is None
    assert "done again" in caplog.text


def test_another_type_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DamagedDataError, match=r"a\.json .* is damaged: its 'step' is 'x'; remove it"):
        parse(b'{"step": "x"}', "a.json", {"step": int}, "remove it")
    (tmp_path / "clock.json").write_text('{"seconds": "x", "finished": null}')
    assert Clock(str(tmp_path)).hours < 0.01
    (tmp_path / "config.json").write_text('{"data": 3, "train": {}}')
    with pytest.raises(DamagedDataError, match="its 'data' is 3; it says what is trained there"):
        find_result(tiny_config(), str(tmp_path))


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    config = to_dict(tiny_config())
    for name, result in (("good", {"student": {"top1": 50.0}}), ("hurt", {"student": {"top1": "x"}}), ("worse", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    (tmp_path / "worse" / "config.json").write_text(json.dumps(config | {"teacher": {}}))
    told = {line.split()[0]: line.split()[1:] for line in listing(str(tmp_path)).splitlines()[2:]}
    assert (told["good"][0], told["good"][-1]) == ("finished", "50.00")
    assert told["hurt"] == told["worse"] == ["damaged"]
    with pytest.raises(DamagedDataError, match=r"result\.json is damaged, .*KeyError: 'images_per_second'"):
        shown(str(tmp_path / "hurt"))
    with pytest.raises(DamagedDataError, match=r"in .*/hurt is damaged, or of another release \(ValueError"):
        report.main([str(tmp_path / "hurt")], "report")


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    assert read_json(str(tmp_path / "nix.json")) is None
    assert read_if_sound(str(tmp_path / "nix.json")) is None


@pytest.mark.parametrize("damage", ["empty marker", "no state", "cut state", "marker without digest"])
def test_a_damaged_checkpoint_gives_way_to_the_older_one(damage: str, tmp_path: Path) -> None:
    checkpoint.save(str(tmp_path), 1, {"step": 1}, 2)
    newest = Path(checkpoint.save(str(tmp_path), 2, {"step": 2}, 2))
    if damage == "no state":
        (newest / "state.pt").unlink()
    elif damage == "cut state":
        (newest / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:-10])
    else:
        (newest / "committed.json").write_text("" if damage == "empty marker" else "{}")
    found = checkpoint.newest(str(tmp_path))
    assert found is not None
    assert checkpoint._step(found[0]) == 1


def test_a_run_gets_over_damage_to_its_files_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    run_tiny(tmp_path / "whole", run={"keep_best": True})
    shutil.copytree(tmp_path / "whole", tmp_path / "hurt")
    for name in ("result.json", "teacher.json", "best.json"):
        (tmp_path / "hurt" / name).write_text("{")
    with (tmp_path / "hurt" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 3, "x": {}\n[]\n{"kind": "eval"}\n\n\0\0\0')
    (tmp_path / "hurt" / "student.safetensors").unlink()
    run_tiny(tmp_path / "hurt", run={"keep_best": True})
    student = "student.safetensors"
    assert (tmp_path / "hurt" / student).read_bytes() == (tmp_path / "whole" / student).read_bytes()
    best = [json.loads((tmp_path / name / "best.json").read_text())["step"] for name in ("hurt", "whole")]
    assert best[0] == best[1]
    lines = [json.loads(line) for line in (tmp_path / "hurt" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in read_metrics(str(tmp_path / "hurt"), "eval")] == [3, 6]


def test_what_is_saved_after_damage_is_kept(tmp_path: Path) -> None:
    """The damaged checkpoint is of a later step than those that follow, and not the newest of them for ever."""
    config = tiny_config(run={"keep_checkpoints": 1})
    student = lone_student(config, tiny_data(), build_model("cifar/resnet8", 10).eval(), cpu())
    state = state_of(student, 5, [])
    newest = Path(checkpoint.save(str(tmp_path), 5, state, keep=1))
    (newest / "state.pt").write_bytes(b"")
    assert resume(student, str(tmp_path)) == 0
    checkpoint.save(str(tmp_path), 1, state | {"step": 1}, keep=1)
    assert resume(student, str(tmp_path)) == 1


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DamagedDataError, match=r"config\.json .* it has no 'data'; it says what is trained there"):
        find_result(tiny_config(), str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(tiny_config()) | {"optim": 3}))
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(UserError, match="was begun with another configuration"):
        find_result(tiny_config(), str(tmp_path))


def test_damage_in_a_search(tmp_path: Path) -> None:
    table = Table(str(tmp_path), "top1")
    for name in ("x", "y"):
        table.begin(name, None, {})
    (tmp_path / "clock.json").write_text("")
    assert Clock(str(tmp_path)).hours < 0.01
    file = tmp_path / "trials" / "0001.json"
    whole = file.read_text()
    point = {"epoch": 1, "step": 3, "top1": "x", "top5": 1.0, "cross_entropy": 1.0}
    for text, problem in (
        ('{"number": 1}', r"0001\.json .* has no 'id'; remove it, and the table goes on"),
        (whole.replace('"running"', '"gone"'), r"0001\.json is damaged, or of another version .*'gone'.*: remove it"),
        (whole.replace('"curve": []', '"curve": [{"top1": 1}]'), r"0001\.json is damaged"),
        (whole.replace('"number": 1', '"number": "1"'), r"0001\.json .* its 'number' is '1'; remove it"),
        (whole.replace('"curve": []', json.dumps({"curve": [point]})[1:-1]), r"0001\.json is damaged, .*'top1': 'x'"),
    ):
        file.write_text(text)
        with pytest.raises(DamagedDataError, match=problem):
            Table(str(tmp_path), "top1")
    file.unlink()
    assert list(Table(str(tmp_path), "top1").rows) == ["x"]
