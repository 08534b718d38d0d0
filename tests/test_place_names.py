"""What users type for places, and the names that folders may have."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_config

from mimkd_ray import storage
from mimkd_ray.cli import cache_teacher, command_line, search
from mimkd_ray.cli.doctor import doctor
from mimkd_ray.cli.training import absolute, run, run_directory
from mimkd_ray.config import Config, DoctorConfig, PrepareConfig, RunConfig
from mimkd_ray.config.form.json_form import from_dict, to_dict
from mimkd_ray.data.prepare.make_shards import prepare
from mimkd_ray.errors import UserError
from mimkd_ray.places import check_name, place
from mimkd_ray.recipes import IMAGENET_RECIPES

ODD = "my runs #1 %41 50% é 数据 [a]*?"
"""A folder's name as people have them."""


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("~/x", "HOME/x"),
        ("~", "HOME"),
        ("file:///data/x/", "/data/x"),
        ("file:/data/x", "/data/x"),
        ("file://localhost/data/x", "/data/x"),
        ("FILE:///data/my%20runs%2341", "/data/my runs#41"),
        ("file:///data/a b#c?d", "/data/a b#c?d"),
        ("file://~/x", "HOME/x"),
        ("/data//x/../y/", "/data/y"),
        ("runs/", "HERE/runs"),
        (f"./{ODD}/", f"HERE/{ODD}"),
        ("./~/x", "HERE/~/x"),
        ("a:b", "HERE/a:b"),
        ("s3://bucket//double/", "s3://bucket/double"),
        ("s3://bucket/a///b//", "s3://bucket/a/b"),
        ("S3://Bucket/A", "s3://Bucket/A"),
        ("s3://bucket", "s3://bucket"),
        (f"s3://bucket/{ODD}/", f"s3://bucket/{ODD}"),
        ("memory://x//y/", "memory://x/y"),
        ("http://host//x?a=//b/", "http://host//x?a=//b"),
        ("simplecache::s3://bucket//x", "simplecache::s3://bucket//x"),
    ],
)
def test_what_is_typed_becomes_a_place(typed: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    found = found.replace("HOME", str(tmp_path / "home")).replace("HERE", str(tmp_path / "here"))
    assert place(typed) == found
    assert place(found) == found, "a place is its own place"
    assert place(found + "/") == found


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("runs\n", "control characters"),
        ("a\0b", "control characters"),
        ("s3:/bucket/x", r"write s3://bucket/x"),
        ("s3:///x", "names no bucket"),
        ("s3://bucket/../other", "object stores know no"),
        ("file://runs/x", r"another machine, 'runs'.*three slashes"),
        ("~no-such-user-here/x", r"no user 'no-such-user-here'.*write \./~no"),
    ],
)
def test_what_can_be_no_place_is_refused_with_the_remedy(typed: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        place(typed)


def test_every_place_of_a_job_goes_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    typed: dict[str, tuple[str, ...]] = {
        "data": ("root", "store"),
        "teacher": ("weights",),
        "student": ("weights",),
        "cache": ("root",),
    }
    typed["run"] = ("root",)
    names = [(section, name) for section, fields in typed.items() for name in fields]
    for text in ("~/a b", f"file://{tmp_path}/a%20b", "a b/"):
        sections: dict[str, dict[str, Any]] = {
            section: dict.fromkeys(fields, text) for section, fields in typed.items()
        }
        sections["cache"]["live"] = True
        config = absolute(tiny_config(**sections))
        assert {getattr(getattr(config, section), name) for section, name in names} == {str(tmp_path / "a b")}
    assert absolute(Config()).data.root == "digits"


@pytest.mark.parametrize("form", ["~/{}", "{}", "file://{home}/{}"])
def test_a_run_in_a_folder_with_an_odd_name(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    name = ODD.replace("%41", "%2541") if form.startswith("file:") else ODD
    root = form.format(name, home=tmp_path)
    config = tiny_config(run={"root": root, "name": "x #%41"}, train={"max_steps": 1}, launch={"gpu": "off"})
    run(config)
    assert (tmp_path / ODD / "x #%41" / "result.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [ODD]
    place_of_weights = form.format(f"{name}/x #%41/student.safetensors".replace("x #%41", "x #%2541"), home=tmp_path)
    weights = place_of_weights if form.startswith("file:") else str(tmp_path / ODD / "x #%41" / "student.safetensors")
    again = replace(config, student=replace(config.student, weights=weights), run=replace(config.run, name="again"))
    assert run(again)["steps"] == 1


def test_other_jobs_take_places_the_same_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "c.json").write_text(json.dumps(to_dict(Config(recipe="mine"))))
    assert command_line.read_config(f"file://{tmp_path}/a%20b/c.json", Config).recipe == "mine"
    with pytest.raises(UserError, match=f"--source {tmp_path}/none does not exist"):
        prepare(PrepareConfig(source="~/none", target="~/there"))
    assert cache_teacher.look_after("ls", ["--cache.root", f"file://{tmp_path}/a%20b"], "x") == 0
    assert "0.0 MB in all" in capsys.readouterr().out
    with pytest.raises(UserError, match="lies in --source"):
        PrepareConfig(source="~/x", target=f"file://{tmp_path}/x/y")
    with pytest.raises(UserError, match="three slashes"):
        doctor(DoctorConfig(root=("file://a/b",)))


BAD_NAMES = ["..", ".", "a/b", "/", "../x", "a\0b", "a\nb", "a\rb", "\x1b[2J", "a\u2028b", "n" * 201, "é" * 101, " "]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_is_one_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it becomes the name of one folder"):
        RunConfig(name=name)
    value = to_dict(Config())
    with pytest.raises(UserError, match=r"run\.name .* it becomes the name of one folder"):
        from_dict(Config, {**value, "run": {**value["run"], "name": name}})
    with pytest.raises(UserError, match=r"--split .* it becomes the name of one folder"):
        PrepareConfig(source="x", target="y", split=name)
    with pytest.raises(UserError, match=r"recipe .* it becomes the name of one folder"):
        run(replace(from_dict(Config, {**value, "recipe": name}), run=RunConfig(root=str(tmp_path / "runs"))))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["lr[0]", "a b", "a#b%41", "é 数据", "...", "-x", "a\\b", "n" * 200, "*?"])
def test_names_that_people_use_are_fine(name: str) -> None:
    check_name("run.name", name)
    assert run_directory(Config(run=RunConfig(root="/runs", name=name))) == f"/runs/{name}"


def test_a_bad_name_on_the_command_line_is_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train, find = partial(command_line.main, IMAGENET_RECIPES, "demo"), partial(search.main, IMAGENET_RECIPES)
    value = {**to_dict(Config()), "recipe": "../../x"}
    (tmp_path / "c.json").write_text(json.dumps(value))
    for job, flags in (
        (train, ["demo", "--run.name", ".."]),
        (find, ["demo", "--run.name", "a\nb", "--run.overwrite", "true"]),
        (train, ["demo", "--config", str(tmp_path / "c.json")]),
    ):
        assert job([*flags, "--run.root", str(tmp_path / "runs" / "x")]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert "it becomes the name of one folder" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json"]


def test_places_on_object_storage(bucket: str) -> None:
    config = tiny_config(
        run={"root": f"{bucket}//a b//", "name": "lr[0]"}, train={"max_steps": 1}, launch={"gpu": "off"}
    )
    run(config)
    assert storage.exists(f"{bucket}/a b/lr[0]/result.json")
    assert storage.list_dirs(bucket) == [f"{bucket}/a b"]
