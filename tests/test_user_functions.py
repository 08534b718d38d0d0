"""Functions by import path: found in the current folder whatever started the process; what they raise is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mimkd_ray.data.augment.pipelines import make_pipeline
from mimkd_ray.errors import UserError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.user_functions import call_named, named_function

ROOT = Path(__file__).parents[1]
MODULE = """
from torch import nn
from mimkd_ray.models import cifar_registry

def net(num_classes):
    return cifar_registry.NETWORKS["resnet8_w4"](num_classes)

def views(size):
    return nn.Identity()
"""


def fails(num_classes: int) -> None:
    raise RuntimeError(f"no weights\nfor {num_classes} classes")


def fails_at_size(size: int) -> None:
    raise KeyError(size)


def refuses(num_classes: int) -> None:
    raise UserError("train it first")


def test_a_job_finds_modules_of_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "mine_too.py").write_text(MODULE)
    code = (
        "import sys; from mimkd_ray.cli.command_line import parse; from mimkd_ray.recipes import IMAGENET_RECIPES"
        " as recipes; from mimkd_ray.cli.preflight import preflight;"
        " preflight(parse(recipes, 'demo', sys.argv[1:], 'job'))"
    )
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "job.py").write_text(code)
    flags = ("--data.pipeline", "mine:views", "--student.name", "mine_too:net")
    command = [sys.executable, "scripts/job.py", *flags]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_what_a_factory_raises_is_one_line_with_its_place() -> None:
    why = "called with num_classes=7, it raised RuntimeError: no weights for 7 classes"
    line = rf"model 'test_user_functions:fails': {why} \("
    with pytest.raises(UserError, match=rf"{line}.*test_user_functions\.py, line \d+\)$"):
        build_model("test_user_functions:fails", 7)
    with pytest.raises(
        UserError, match=r"pipeline 'test_user_functions:fails_at_size': called with 32, it raised KeyError"
    ):
        make_pipeline("test_user_functions:fails_at_size", 32)
    with pytest.raises(UserError, match=r"^train it first$"):
        call_named("model", "test_user_functions:refuses", refuses, num_classes=3)


def uses_a_library_wrongly(num_classes: int) -> None:
    json.loads("{" * num_classes)


def test_the_place_is_in_the_users_code_and_not_in_the_library_that_it_calls() -> None:
    line = uses_a_library_wrongly.__code__.co_firstlineno + 1
    with pytest.raises(UserError, match=rf"raised JSONDecodeError: .*test_user_functions\.py, line {line}\)$"):
        build_model("test_user_functions:uses_a_library_wrongly", 7)


def test_a_module_that_cannot_be_imported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_nets.py").write_text("def net(:\n")
    (tmp_path / "raising_nets.py").write_text("import math\nmath.nothing\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(UserError, match=r"model 'broken_nets:net': importing 'broken_nets' failed: SyntaxError"):
        named_function("model", "broken_nets:net")
    with pytest.raises(UserError, match=r"failed: AttributeError: .*nothing.* \(.*raising_nets.py, line 2\)"):
        named_function("model", "raising_nets:net")
    with pytest.raises(UserError, match=rf"cannot import 'absent_nets': .*start from its folder \({tmp_path}"):
        named_function("model", "absent_nets:net")
