"""The pages for people: links and files that exist, flags that the command lines have, an example that runs."""

from __future__ import annotations

import argparse
import ast
import builtins
import contextlib
import inspect
import re
import runpy
import shlex
import textwrap
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

import mimkd_ray
from mimkd_ray.cli import command_line
from mimkd_ray.cli.cache_teacher import AdminJob
from mimkd_ray.cli.commands import COMMANDS
from mimkd_ray.cli.completion import flags
from mimkd_ray.cli.prepare_data import PrepareJob
from mimkd_ray.config import Config, DoctorConfig, ExportConfig, SearchJob
from mimkd_ray.config.jobs.evaluate import EvaluateJob
from mimkd_ray.models.build_model import build_model
from mimkd_ray.train.records.read_run import RunFacts

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / name / "README.md" for name in ("benchmarks", "cluster")),
]
SCRIPT = r"(?<!\S)((?:jobs|benchmarks)/\w+\.py)"
SHOWN = {"teacher", "student", "batches", "config"}
"""Names that the text around a block explains."""
FOLDERS = ("mimkd_ray", "jobs", "examples", "benchmarks", "tests", "docs", "cluster")


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_links_resolve(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert set(missing) == set()


def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(rf"\b((?:{'|'.join(FOLDERS)})/[\w./-]*\w\.\w+)", page.read_text())
    assert {name for name in named if "NAME" not in name and not (ROOT / name).exists()} == set()


def test_flags_exist(page: Path) -> None:
    """Dotted flags anywhere; others where a page quotes them: `--push-to ORG/NAME`."""
    known = {flag for kind in (SearchJob, EvaluateJob, DoctorConfig) for flag in flags(kind)} | {
        "help-all",
        "master-port",
    }
    known |= {flag for kind in (ExportConfig, PrepareJob, AdminJob) for flag in flags(kind)}
    for source in (*(ROOT / "mimkd_ray").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")):
        known |= set(re.findall(r'"--([a-z][a-z0-9-]+)"', source.read_text()))
    shown = re.findall(r"--([a-z]+(?:\.[a-z][a-z_-]*[a-z])+)", page.read_text())
    shown += re.findall(r"`--([a-z0-9][a-z0-9-]+)[ `]", page.read_text())
    assert {flag.replace("_", "-") for flag in shown} - known == set()


def commands() -> Iterator[tuple[str, str]]:
    """Yield the command lines that blocks of the pages show, and those that a page quotes: (command, arguments)."""
    for page in (*PAGES, *(ROOT / "jobs").glob("*.py")):
        text = page.read_text().replace("\\\n", " ")
        quoted = [each for each in re.findall(r"(?<!`)`([^`]+)`(?!`)", text) if "benchmarks/" not in each]
        start = r"^(?:ray|torchrun|python|jobs)\b.*" if page.suffix == ".py" else r"^    .*"
        for line in (*re.findall(start, text, re.MULTILINE), *quoted):
            found = re.search(rf"(?:(?:mimkd-ray|-m mimkd_ray) ([a-z]+)|{SCRIPT})( .*|$)", line)
            arguments = re.sub(r" (&&|# ).*", "", found[3]).strip() if found else ""
            if found and not re.search(r"\.\.\.|[|\[]", arguments):
                yield found[1] or found[2], arguments


@pytest.mark.parametrize(("command", "arguments"), sorted(set(commands())))
def test_commands_are_understood(command: str, arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is started, and ends once it has read its arguments. The runs, and the files of --config, are somebody's."""

    def ends(read: Callable[..., Any]) -> Callable[..., None]:
        def reads(*given: Any, **more: Any) -> None:
            read(*given, **more)
            raise SystemExit(0)  # as after --help

        return reads

    read_config = command_line.parse
    monkeypatch.setattr(command_line, "parse", lambda *given: read_config(*given) and None)
    monkeypatch.setattr(command_line, "read_config", lambda _, kind: kind())
    monkeypatch.setattr(command_line, "wait_asleep", lambda: None)
    monkeypatch.setattr(tyro, "cli", ends(tyro.cli))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", ends(argparse.ArgumentParser.parse_args))
    for own in ("evaluate", "export"):
        monkeypatch.setattr(f"mimkd_ray.cli.{own}.read_run", lambda place: RunFacts(place, Config()))
    words = shlex.split(arguments)
    if command in COMMANDS:
        module, _, function = COMMANDS[command][0].partition(":")
        job = getattr(import_module(module), function)
        assert command_line.guarded(command, lambda: job(words, command), "") == 0
    else:
        monkeypatch.setattr("sys.argv", [command, *words])
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / command), run_name="__main__")
        assert ended.value.code == 0


def snippets(page: Path) -> Iterator[ast.Module]:
    """Yield the Python of a page: fenced blocks, and the indented blocks and quotes that speak of the package."""
    text = page.read_text()
    yield from map(ast.parse, re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    shown = [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)]
    for code in (*shown, *re.findall(r"(?<!`)`([^`]+)`(?!`)", text)):
        if re.search(r"\bmimkd_ray\.\w+|^\w+\(", code):
            with contextlib.suppress(SyntaxError):  # of a shell
                yield ast.parse(code)


def test_python_is_of_this_interface(page: Path) -> None:
    """Names of the package and of what is imported exist, and their functions take the arguments that are shown."""
    for tree in snippets(page):
        names: dict[str, Any] = {"mimkd_ray": mimkd_ray}
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        own = [node for node in imports if not ast.unparse(node).startswith("from ray")]  # one_ray/test_tune_search.py
        exec(compile(ast.Module(own, []), str(page), "exec"), names)
        known = {*names, *dir(builtins), *SHOWN, *mimkd_ray.__all__, *(a.name for node in imports for a in node.names)}
        known |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        known |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
                assert hasattr(names[node.value.id], node.attr), ast.unparse(node)
            elif isinstance(node, ast.Name) and (len(tree.body) > 1 or isinstance(tree.body[0], ast.FunctionDef)):
                assert node.id in known, f"{node.id} comes from nowhere"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func).removeprefix("mimkd_ray.")
                if called in mimkd_ray.__all__:
                    given = [each for each in node.args if ast.unparse(each) != "..."]
                    keywords = {each.arg: None for each in node.keywords if each.arg}
                    inspect.signature(getattr(mimkd_ray, called)).bind_partial(*given, **keywords)


def test_the_own_loop_of_the_readme_runs() -> None:
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found
    torch.manual_seed(0)
    student = build_model("resnet18", 10)
    before = {name: value.clone() for name, value in student.named_parameters()}
    names: dict[str, Any] = {
        "teacher": build_model("resnet34", 10),
        "student": student,
        "batches": [(torch.randn(4, 3, 32, 32), torch.arange(4), torch.arange(4) + 4 * step) for step in range(2)],
    }
    exec(found[1], names)
    assert torch.isfinite(names["loss"].total)
    assert {"ce", "global/avgpool-avgpool", "feature/layer3-layer3"} <= set(names["loss"].terms)
    assert all(not torch.equal(value, before[name]) for name, value in student.named_parameters())
    for page in PAGES:
        for name in re.findall(r"\bdistiller\.(?!py\b)(\w+)", page.read_text()):
            assert hasattr(names["distiller"], name), (page, name)
    assert int(names["distiller"].loss.queue.filled_Q.sum()) == 8, "both steps' vectors are in the queue"
