"""The pages for people: links and files that exist, flags that the command lines have, an example that runs."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mimkd_ray.cli.common import parse
from mimkd_ray.config import Config, SearchJob
from mimkd_ray.config.jobs.evaluate import EvaluateJob
from mimkd_ray.models.zoo import build_model
from mimkd_ray.recipes import CIFAR_RECIPES, IMAGENET_RECIPES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"]
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
    known = {name.replace("_", "-") for name in (*dotted(SearchJob()), *dotted(EvaluateJob()))}
    flags = re.findall(r"--([a-z]+(?:\.[a-z][a-z_-]*[a-z])+)", page.read_text())
    assert {flag.replace("_", "-") for flag in flags} - known == set()


def commands() -> Iterator[tuple[str, str]]:
    """Yield the commands of jobs with a recipe's fields that the pages show, as (job, arguments)."""
    for page in PAGES:
        for line in page.read_text().replace("\\\n", " ").splitlines():
            found = re.search(r"^    .*jobs/(imagenet|cifar100|search|cache_teacher)\.py( [^#`|]*)?", line)
            if found and not re.search(r"\.\.\.|^ (ls|verify|gc) ", found[2] or ""):
                yield found[1], (found[2] or "").strip()


@pytest.mark.parametrize(("job", "arguments"), list(commands()))
def test_commands_are_understood(job: str, arguments: str) -> None:
    """All but the file of --config, which is that of somebody's run."""
    words = shlex.split(re.sub(r"^plan|--config \S+", "", arguments))
    recipes = {"custom": Config, **IMAGENET_RECIPES, **CIFAR_RECIPES}
    if job == "search":
        assert parse(dict.fromkeys(recipes, SearchJob), "custom", words, job) is not None
    else:
        assert parse(recipes, "custom", words, job) is not None


def dotted(config: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all fields of a config."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from dotted(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


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
    assert int(names["distiller"].loss.queue.filled_Q.sum()) == 8, "both steps' vectors are in the queue"
