"""The public interface of `import mimkd_ray`: lazy, quick, without Ray."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import mimkd_ray
from mimkd_ray import DataConfig, UserError, build_model, evaluate
from mimkd_ray.data.sources.digits import DigitsSource

ROOT = Path(__file__).resolve().parents[1]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=ROOT)


def test_the_import_is_quick_and_brings_neither_ray_nor_torch() -> None:
    found = python(
        "-X", "importtime", "-c", "import mimkd_ray, sys; print('ray' in sys.modules, 'torch' in sys.modules)"
    )
    assert found.stdout.split() == ["False", "False"]
    (microseconds,) = re.findall(r"\|\s*(\d+) \| mimkd_ray$", found.stderr, re.MULTILINE)
    assert int(microseconds) < 100_000


def test_heavy_packages_are_imported_when_they_are_needed() -> None:
    """In one process, from what needs little to all names: what a job imports before its opening block has neither
    torchvision, whose import takes as long as torch's, nor Ray, which no name of the package needs."""
    early = ("models.build_model", "models.cifar_registry", "taps.default_stages", "taps.tapped_model", "cli.training")
    code = (
        "import sys\n"
        "def there(*names): print(sorted({*names} & sys.modules.keys()))\n"
        "from mimkd_ray.data.sources.data_set import *\n"
        "open_data(DataConfig())\n"
        "there('sklearn', 'torchvision', 'pyarrow', 'fsspec', 'ray')\n"
        f"import {', '.join(f'mimkd_ray.{name}' for name in early)}\n"
        "there('ray', 'torchvision', 'timm')\n"
        "for name in mimkd_ray.__all__: assert getattr(mimkd_ray, name) is not None, name\n"
        "there('ray', 'torch')\n"
    )
    assert python("-c", code).stdout.splitlines() == ["[]", "[]", "['torch']"]


def test_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse(Path(mimkd_ray.__file__).read_text())
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen, plain = {}, {}
    for node in checked.body:
        if isinstance(node, ast.Assign):
            (target,) = node.targets
            assert isinstance(target, ast.Name)
            assert isinstance(node.value, ast.Name)
            seen[target.id] = plain[node.value.id]
            continue
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            found = seen if alias.asname else plain
            found[alias.name] = node.module, alias.name
            # Where there is py.typed, a type checker takes an import under another name for private.
            assert alias.asname in (None, alias.name), f"{alias.name} is not exported as {alias.asname}"
    assert sorted(seen) == sorted(mimkd_ray.__all__) == list(mimkd_ray.__all__)
    for name, (home, inner) in seen.items():
        expected = getattr(__import__(home or "", fromlist=[inner]), inner)
        if name != "search":  # a package that is called like its function
            assert getattr(mimkd_ray, name) is expected, name


def test_every_name_is_documented_and_listed() -> None:
    listed = dir(mimkd_ray)
    for name in mimkd_ray.__all__:
        assert name in listed
        text = getattr(mimkd_ray, name).__doc__
        assert text, f"{name} has no docstring"
        assert not text.startswith(f"{name}("), f"{name} has the docstring that dataclasses make"


def test_what_is_not_there() -> None:
    with pytest.raises(AttributeError, match=r"mimkd_ray.*'distil'"):
        _ = mimkd_ray.distil  # type: ignore[attr-defined]


def test_the_package_says_its_version_and_that_it_is_typed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mimkd_ray.__version__"}
    assert mimkd_ray.__version__ == "0.2.0"
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["mimkd_ray"]
    assert (ROOT / "mimkd_ray" / "py.typed").exists()


# evaluate


class Digits:
    def __init__(self) -> None:
        self.source = DigitsSource("val")

    def __len__(self) -> int:
        return 450

    def __getitem__(self, row: int) -> tuple[Any, int]:
        (found,) = self.source.read([row])
        return Image.fromarray(found.image), found.label  # type: ignore[arg-type]


CONFIG = DataConfig(root="digits", loader_workers=0)


def by_hand(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised validation images, labels, and logits in evaluation mode."""
    rows = DigitsSource("val").read(range(450))
    images = torch.from_numpy(np.stack([row.image for row in rows])).permute(0, 3, 1, 2) / 255
    images = (images - torch.tensor(CONFIG.mean).view(3, 1, 1)) / torch.tensor(CONFIG.std).view(3, 1, 1)
    labels = torch.tensor([row.label for row in rows])
    with torch.no_grad():
        return images, labels, model.eval()(images)


def test_evaluate_is_what_one_counts_by_hand() -> None:
    torch.manual_seed(0)
    model = build_model("cifar/resnet8", 10)
    images, labels, logits = by_hand(model)
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)).eval()
    top1 = 100 * float((logits.argmax(1) == labels).double().mean())
    top5 = 100 * float((logits.topk(5).indices == labels[:, None]).any(1).double().mean())
    loader = DataLoader(TensorDataset(images, labels), batch_size=64)
    for found in (evaluate(model, CONFIG), evaluate(model, CONFIG, Digits()), evaluate(model, loader)):  # type: ignore[arg-type]
        assert (found.top1, found.top5, found.rows) == (pytest.approx(top1), pytest.approx(top5), 450)
        assert found.cross_entropy == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
        assert model.training
        assert not frozen.training, "what was frozen stays so"


def test_evaluate_refuses_what_are_no_batches() -> None:
    model = build_model("cifar/resnet8", 10)
    with pytest.raises(UserError, match="batch 0 is a Tensor"):
        evaluate(model, [torch.zeros(2, 3, 8, 8)])  # type: ignore[list-item]
    with pytest.raises(UserError, match="gave no images"):
        evaluate(model, [])
    with pytest.raises(UserError, match="goes with a DataConfig"):
        evaluate(model, [], Digits())  # type: ignore[arg-type]
    images = torch.zeros(4, 3, 8, 8)
    for labels, message in (
        (torch.tensor([0, 1, 10, 3]), "labels from 0 to 10, and cifar/resnet8 gives 10 logits"),
        (torch.tensor([0, -100, 1, 3]), "labels from -100 to 3"),  # which torch would leave out of the cross-entropy
        (torch.zeros(4, 10), r"labels are \(4, 10\) of torch.float32, for 4 images"),
        (torch.zeros(3, dtype=torch.int64), r"labels are \(3,\) of torch.int64, for 4 images"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(model, [(images, labels)])
    with pytest.raises(UserError, match="labels from 0 to 9, and cifar/resnet8 gives 5 logits"):
        evaluate(build_model("cifar/resnet8", 5), CONFIG)
    with pytest.raises(UserError, match=r"Conv2d returns a tensor of shape \(4, 2, 8, 8\), not logits"):
        evaluate(torch.nn.Conv2d(3, 2, 1), [(images, torch.zeros(4, dtype=torch.int64))])
    assert (
        evaluate(build_model("cifar/resnet8", 10).bfloat16(), [(images, torch.zeros(4, dtype=torch.int32))]).rows == 4
    )
    assert model.training, "also after an error"


def test_the_first_line_of_a_job_waits_for_no_large_package() -> None:
    """By the order, not by the clock: which modules are there when the line is told."""
    code = (
        "import json, os, sys\n"
        "from mimkd_ray import console\n"
        "from mimkd_ray.cli import command_line\n"
        "from mimkd_ray.recipes import IMAGENET_RECIPES\n"
        "def first(text):\n"
        "    print(json.dumps([text, sorted({name.partition('.')[0] for name in sys.modules}),"
        " os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT')]), flush=True)\n"
        "    os._exit(0)\n"
        "console.line = first\n"
        "command_line.main(IMAGENET_RECIPES, 'demo', [], 'job')\n"
    )
    text, loaded, *waiting = json.loads(python("-c", code).stdout)
    assert text == "demo: cifar/resnet20 teaches cifar/resnet8; loading PyTorch"
    assert waiting == ["PASSIVE", "10000"], "torch reads it when it is imported"
    large = {"torch", "torchvision", "timm", "ray", "numpy", "pandas", "pyarrow", "fsspec", "PIL", "sklearn"}
    assert not (large | {"tyro", "tqdm"}) & set(loaded)
