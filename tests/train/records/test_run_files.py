"""`--run.overwrite true` removes what a run writes, and nothing else: a name typed wrong has cost a home folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_config

from mimkd_ray import storage
from mimkd_ray.cli import search as search_line
from mimkd_ray.cli import training
from mimkd_ray.config import Config, LaunchConfig, RunConfig, SearchJob
from mimkd_ray.config.form.json_form import to_dict
from mimkd_ray.config.jobs.search import SearchConfig, search_job
from mimkd_ray.errors import UserError
from mimkd_ray.run_lock import held
from mimkd_ray.search.configs import claim
from mimkd_ray.train.records import run_files


def small(root: Path | str, **run: object) -> Config:
    """A run of two steps."""
    fields = {"root": str(root), "name": "one", **run}
    return tiny_config(run=fields, train={"max_steps": 2}, launch={"gpu": "off"})


def overwritten(config: Config) -> None:
    training.run(replace(config, run=replace(config.run, overwrite=True)))


def files(folder: Path) -> list[str]:
    return storage.list_tree(str(folder))


@pytest.mark.parametrize("kind", ["parquet alone", "home", "other config", "not JSON", "a list", "a folder for config"])
def test_a_directory_that_is_no_runs_is_refused_and_stays(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "people" / "one"
    place.mkdir(parents=True)
    (place / "train-00000.parquet").write_bytes(b"mine")
    (place / "checkpoints").mkdir()
    (place / "result.json").write_text("{}")
    if kind == "home":
        monkeypatch.setenv("HOME", str(place))
    elif kind == "a folder for config":
        (place / "config.json").mkdir()
        (place / "config.json" / "x").touch()
    elif kind != "parquet alone":
        text = {"other config": '{"model_type": "vit", "train": 1}', "not JSON": "data: 1", "a list": "[1]"}[kind]
        (place / "config.json").write_text(text)
    before = files(place)
    config = small(tmp_path / "people")
    with pytest.raises(
        UserError, match=r"is not the directory of a run.*Nothing was removed: give another --run\.name"
    ):
        overwritten(config)
    with pytest.raises(UserError, match="Nothing was removed"):
        search_line.search(search_of(config))
    assert files(place) == before
    assert (place / "checkpoints").is_dir()


def search_of(config: Config) -> SearchJob:
    changes: dict[str, Any] = {"run": replace(config.run, overwrite=True), "launch": LaunchConfig()}
    changes["train"] = replace(config.train, max_steps=0)
    return search_job(config, **changes, search=SearchConfig(holdout=0.3))


@pytest.mark.parametrize(("theirs", "ours"), [("search", "run"), ("run", "search")])
def test_a_search_and_a_run_do_not_overwrite_each_other(theirs: str, ours: str, tmp_path: Path) -> None:
    config, place = small(tmp_path), tmp_path / "one"
    storage.write_bytes(str(place / "trials" / "0000.json"), b"{}")
    marker = search_of(config) if theirs == "search" else config
    (place / "config.json").write_text(json.dumps(to_dict(marker)))
    with pytest.raises(UserError, match=rf"one is the directory of a {theirs}, and this is a {ours}\. Nothing was"):
        overwritten(config) if ours == "run" else search_line.search(search_of(config))
    assert files(place) == ["config.json", "trials/0000.json"]


def test_a_search_that_goes_on_is_not_overwritten(tmp_path: Path) -> None:
    job = search_of(small(tmp_path))
    other = replace(job, search=replace(job.search, seed=7))
    claim(other, str(tmp_path / "one"))
    with held(str(tmp_path / "one")):
        before = files(tmp_path)
        with pytest.raises(UserError, match=r"one is in use by process \d+ on .*pass another --run\.name"):
            search_line.search(job)
        assert files(tmp_path) == before
    with pytest.raises(UserError, match=r"search\.seed: 7 -> 0.*--run\.overwrite true to start anew"):
        search_line.search(replace(job, run=replace(job.run, overwrite=False)))
    assert files(tmp_path) == ["one/config.json"]


def test_what_others_put_into_a_run_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small(tmp_path, log_samples=True, keep_best=True, tensorboard=True)
    training.run(config)
    place = tmp_path / "one"
    mine = ["notes.txt", "data/train-0.parquet", "checkpoints/mine.pt", "trials/my.csv", "result.json.bak", ".env"]
    for name in mine:
        storage.write_bytes(str(place / name), b"mine")
    (place / ".metrics.jsonl.123-0123456789ab.tmp").write_bytes(b"torn")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "x").mkdir(parents=True)
    (place / "link").symlink_to(elsewhere)
    (place / "best.json").unlink()
    (place / "best.json").symlink_to(elsewhere / "x")
    left = run_files.remove_run(str(place))
    assert left == files(place) == sorted([*mine, "link"])
    assert (elsewhere / "x").is_dir()
    assert not (place / "tensorboard").exists()

    training.run(config)
    capsys.readouterr()
    overwritten(config)
    assert ".env, checkpoints/mine.pt, data/train-0.parquet and 4 more stays there: no run writes that" in (
        capsys.readouterr().out
    )
    assert set(mine) < set(files(place))


def test_a_directory_of_files_of_ours_alone_goes(tmp_path: Path) -> None:
    training.run(small(tmp_path, tensorboard=True))
    assert run_files.remove_run(str(tmp_path / "one")) == []
    assert [place.name for place in tmp_path.iterdir()] == ["evaluations"]  # of all runs there
    assert run_files.remove_run(str(tmp_path / "one")) == []
    (tmp_path / "empty").mkdir()
    assert run_files.remove_run(str(tmp_path / "empty")) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file is a file, and a run needs a folder"):
        run_files.remove_run(str(tmp_path / "file"))


def test_checkpoints_on_another_disk(tmp_path: Path) -> None:
    """A link in the place of a folder of ours goes, and nothing behind it: a run would go on from what is there."""
    config = small(tmp_path, checkpoint_steps=1)
    training.run(config)
    (tmp_path / "one" / "checkpoints").rename(tmp_path / "disk")
    (tmp_path / "one" / "checkpoints").symlink_to(tmp_path / "disk")
    behind = files(tmp_path / "disk")
    overwritten(config)
    assert files(tmp_path / "disk") == behind != []
    assert not (tmp_path / "one" / "checkpoints").is_symlink()


def test_a_kill_in_the_middle_leaves_the_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(tmp_path)
    training.run(config)
    remove, left = storage.remove_file, 2

    def dies(url: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        remove(url)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove_file", dies)
        with pytest.raises(KeyboardInterrupt):
            run_files.remove_run(str(tmp_path / "one"))
    assert (tmp_path / "one" / "config.json").is_file()
    overwritten(config)


def test_everything_that_jobs_write_is_on_the_list(tmp_path: Path) -> None:
    """Who adds a file to a run's directory adds it to run_files.py: else overwriting would leave it for the next."""
    fields = {
        "train": {"max_steps": 2, "information_rows": 50},
        "launch": {"gpu": "off"},
        "teacher": {"train": True, "epochs": 1},
        "cache": {"codecs": ("maps=pool4,uint8",), "calibration_rows": 64},
    }
    run = {
        "root": str(tmp_path),
        "name": "compare",
        "checkpoint_steps": 1,
        "log_samples": True,
        "keep_best": True,
        "tensorboard": True,
    }
    training.run(tiny_config(**fields, run=run, compare={"seeds": 1, "arms": ("alone", "kd", "mimkd", "dkd")}))
    found = files(tmp_path / "compare")
    assert "dkd-seed00/result.json" in found
    assert [path for path in found if not run_files.is_ours(path)] == []
    assert any("/checkpoints/step_" in path for path in found)
    assert run_files.remove_run(str(tmp_path / "compare")) == []
    assert [path.name for path in tmp_path.iterdir()] == ["teachers"], "which other runs share"


@pytest.mark.parametrize(
    "path",
    [
        *("train-0.parquet", "a/config.json", "trials/a.txt", "checkpoints/x/state.pt", "teacher/x", "tensorboard/x"),
        *("tune/mine.json", "tune/trial-0a/notes.txt", "trials/mine.json", "tune/trial-0a/checkpoint_000000/x.pt"),
    ],
)
def test_what_is_not_ours(path: str) -> None:
    assert not run_files.is_ours(path)


def test_the_teacher_is_measured_beside_the_trials_of_several_workers() -> None:
    assert run_files.is_ours(f"trials/evaluations/{'0a' * 12}.json")
    assert run_files.is_ours("trials/1a2b_00000/result.json")


def test_on_object_storage(bucket: str) -> None:
    """Names with letters of patterns: somebody else's runs and data stay."""
    for name in ("lr[0]", "lr0"):
        training.run(small(bucket, name=name))
        storage.write_bytes(f"{bucket}/{name}/notes.txt", b"mine")
    other = storage.list_tree(f"{bucket}/lr0")
    assert run_files.remove_run(f"{bucket}/lr[0]") == ["notes.txt"]
    assert storage.list_tree(f"{bucket}/lr[0]") == ["notes.txt"]
    assert storage.list_tree(f"{bucket}/lr0") == other
    with pytest.raises(UserError, match="Nothing was removed"):
        run_files.remove_run(bucket)
    with pytest.raises(UserError, match=r"holds notes\.txt\. Nothing was removed"):
        overwritten(small(bucket, name="lr[0]"))
    storage.write_bytes(f"{bucket}/config.json", json.dumps(to_dict(small(bucket))).encode())
    assert len(run_files.remove_run(bucket)) == len(other) + 2, "even then nothing but the marker goes"


def test_a_relative_root_above_home_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--run.name .. --run.overwrite true` in a folder of one's home removed the home folder."""
    work = tmp_path / "home" / "work"
    work.mkdir(parents=True)
    (tmp_path / "home" / "precious.txt").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(work)
    for root, name in (("../..", "home"), ("~/..", "home"), (f"file://{tmp_path}", "home"), (".", "..")):
        with pytest.raises(UserError, match=r"one folder|not the directory of a run"):
            training.run(replace(small(root), run=RunConfig(root=root, name=name, overwrite=True)))
    assert files(tmp_path) == ["home/precious.txt"]
