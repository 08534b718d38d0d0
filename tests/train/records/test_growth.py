"""What may change between two starts of a run: its length where it stays the same, and anything before it trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import run_tiny, tiny_config

from mimkd_ray import storage
from mimkd_ray.cli.runs import comparison, listing, shown
from mimkd_ray.cli.training import run_directory
from mimkd_ray.errors import UserError
from mimkd_ray.train.records.outcomes import claim

STUDENT = "student.safetensors"


@pytest.mark.parametrize("first", [{"max_steps": 4}, {"epochs": 1}])
def test_a_run_that_grows_ends_as_the_whole_run(tmp_path: Path, first: dict[str, int]) -> None:
    optim = {"schedule": "constant"}
    whole = run_tiny(tmp_path / "whole", optim=optim)
    short = run_tiny(tmp_path / "grown", train=first, optim=optim)
    assert short["steps"] < whole["steps"]
    grown = run_tiny(tmp_path / "grown", optim=optim)
    assert (grown["student"], grown["steps"]) == (whole["student"], whole["steps"])
    assert (tmp_path / "grown" / STUDENT).read_bytes() == (tmp_path / "whole" / STUDENT).read_bytes()
    if "max_steps" in first:
        assert grown["resumed_from"] == 4
        with pytest.raises(UserError, match=r"max_steps is 4, and the run has trained 6 steps: the limit may grow"):
            run_tiny(tmp_path / "grown", train=first, optim=optim)
        (tmp_path / "grown" / "result.json").unlink()  # as of a run that was stopped on its way
        with pytest.raises(UserError, match=r"max_steps is 2, and the run has trained 4 steps: the limit may grow"):
            run_tiny(tmp_path / "grown", train={"max_steps": 2}, optim=optim)


def test_a_schedule_over_more_epochs_is_another_run(tmp_path: Path) -> None:
    run_tiny(tmp_path, optim={"schedule": "cosine"})
    with pytest.raises(UserError, match=r"train\.epochs: 2 -> 3; a schedule over other epochs is another training"):
        run_tiny(tmp_path, optim={"schedule": "cosine"}, train={"epochs": 3})


def test_what_nothing_was_trained_with_locks_nothing(tmp_path: Path) -> None:
    claim(tiny_config(optim={"lr": 0.9}), str(tmp_path))
    (tmp_path / "metrics.jsonl").touch()
    claim(tiny_config(optim={"lr": 0.1}), str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["lr"] == 0.1
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    with pytest.raises(UserError, match=r"optim\.lr: 0\.1 -> 0\.2"):
        claim(tiny_config(optim={"lr": 0.2}), str(tmp_path))
    claim(tiny_config(optim={"lr": 0.1}, teacher={"expect_top1": 50.0}, data={"val_rows": 10}), str(tmp_path))


def test_the_directory_is_named_after_teacher_student_and_data() -> None:
    config = tiny_config(teacher={"name": "cifar/resnet20"}, data={"root": "/sets/my birds"})
    name = run_directory(config).rpartition("/")[2]
    assert name.startswith(f"resnet20-{config.student.name.rpartition('/')[2]}-my_birds-")
    longer = tiny_config(teacher={"name": "cifar/resnet20"}, data={"root": "/sets/my birds"}, train={"max_steps": 3})
    assert run_directory(longer) == run_directory(config)


def test_runs_are_listed_shown_and_compared(tmp_path: Path) -> None:
    run_tiny(tmp_path / "one")
    run_tiny(tmp_path / "two", optim={"lr": 0.03})
    claim(tiny_config(), str(tmp_path / "three"))
    (tmp_path / "three" / "checkpoints" / "step_00000003-abcdef").mkdir(parents=True)  # a kill came in the middle
    claim(tiny_config(), str(tmp_path / "zearch"))  # a search
    (tmp_path / "zearch" / "clock.json").write_text('{"seconds": 9.0, "finished": "finals-1"}')
    (tmp_path / "notes").mkdir()
    rows = listing(str(tmp_path)).splitlines()[2:]
    found = [row.split()[:2] for row in rows]
    assert found == [["one", "finished"], ["three", "begun"], ["two", "finished"], ["zearch", "finished"]]
    assert "run directory: " in shown(str(tmp_path / "one"))
    said = comparison([str(tmp_path / "one"), str(tmp_path / "two")])
    assert f"one -> two:\n  optim.lr: {tiny_config().optim.lr} -> 0.03" in said
    with pytest.raises(UserError, match=r"notes is no run: it has no config\.json"):
        shown(str(tmp_path / "notes"))
    there = f"memory://{tmp_path.name}"
    for file in (*tmp_path.glob("*/*.json"),):
        storage.upload(file, f"{there}/{file.relative_to(tmp_path)}")
    assert listing(there).splitlines()[2:] == rows
    assert shown(f"{there}/one") == shown(str(tmp_path / "one")).replace(str(tmp_path), there)
    assert comparison([f"{there}/one", f"{there}/two"]) == said
    with pytest.raises(UserError, match=r"notes is no run: it has no config\.json"):
        shown(f"{there}/notes")
