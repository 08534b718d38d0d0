"""The commands of `mimkd-ray`: the jobs under one name, the version, completion."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import mimkd_ray
from mimkd_ray.__main__ import main
from mimkd_ray.cli.commands import COMMANDS
from mimkd_ray.cli.completion import WORDS, flags, script
from mimkd_ray.recipes import CIFAR_RECIPES


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"mimkd-ray {name}" in said or f"mimkd_ray {name}" in said
    module, _, function = COMMANDS[name][0].partition(":")
    assert callable(getattr(import_module(module), function))
    config, words = WORDS[name]
    offered = {word for word in words if word.startswith("--")} | {f"--{flag}" for flag in flags(config)}
    listed = set(re.findall(r"^[ │] (?:-h, )?(--[a-z][\w.-]*)", said, re.MULTILINE))
    assert listed <= offered, "completion lacks some"
    if "--help-all" not in offered:  # --help lists them all
        assert offered <= listed, "completion has more"
    for choices in re.findall(r"^  \{(.*)\}$", said, re.MULTILINE):
        assert set(choices.split(",")) <= set(words)


def test_train_takes_the_recipes_of_both_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "resnet32x4_resnet8x4", "--data.root", "x", "--print-config"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["student"]["name"] == CIFAR_RECIPES["resnet32x4_resnet8x4"]().student.name
    assert main(["train", "resnet32x4_resnet8x5"]) == 2
    assert "resnet32x4_resnet8x4" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"mimkd-ray {mimkd_ray.__version__}\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["do"], ["doctor"]),
        (["train", "resnet32x4_res"], ["resnet32x4_resnet8x4"]),
        (["train", "--train.ep"], ["--train.epochs"]),
        (["search", "--search.tri"], ["--search.trials"]),
        (["prepare", "--short"], ["--short-side"]),
        (["evaluate", "--eval.corruptions"], ["--eval.corruptions"]),
        (["runs", "co"], ["compare"]),
    ],
)
def test_completion_in_bash(line: list[str], expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "completion").write_text(script(COMMANDS))
    words = ["mimkd-ray", *line]
    ask = f"source {tmp_path}/completion; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(line)}; _mimkd_ray; "
    done = subprocess.run(["bash", "-c", ask + 'echo "${COMPREPLY[@]}"'], capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "mimkd_ray", "--help"], capture_output=True, text=True, check=True)
    assert "usage: python -m mimkd_ray" in done.stdout
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("job", [["train", "--help-all"], ["completion"]])
def test_a_reader_that_has_gone_is_no_error(job: list[str]) -> None:
    """As of `| head`: the first prints more than fits into a pipe, what the second prints is flushed at its end."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "mimkd_ray", *job], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
