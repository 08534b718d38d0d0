"""The examples run, and train what they say."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from jobs_here import TAKES_LONG

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import an example by its name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_every_example_is_tested() -> None:
    tested = "".join(path.read_text() for path in Path(__file__).parent.glob("**/test_example*.py"))
    assert all(f'example("{path.stem}")' in tested for path in EXAMPLES.glob("*.py"))


def test_batches_of_digits(example: Any) -> None:
    train, held_out = example("small_digits").batches(image_size=16)
    images, labels, _ids = next(iter(held_out))
    assert images.shape == (100, 3, 16, 16)
    assert (len(train), len(labels), len(held_out.dataset)) == (28, 100, 397)


def test_own_loop(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    of_teacher, of_student = example("own_loop").main(epochs=2)
    assert of_teacher > 80
    assert of_student > 60
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "global/pool-pool/nats" in lines[0]
    assert lines[-1] == f"top-1: teacher {of_teacher:.1f} %, student {of_student:.1f} %"


def test_own_dataset(example: Any, tmp_path: Path) -> None:
    module = example("own_dataset")
    result = module.main(str(tmp_path), epochs=3)
    assert result["student"]["top1"] > 50
    assert module.main(str(tmp_path), epochs=3) == result, "the same call finds its run again"


def test_without_labels(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    of_teacher, before, after = example("without_labels").main(epochs=3)
    assert of_teacher > 60  # a tenth by chance: it has seen no label
    assert after > before + 10
    assert capsys.readouterr().out.splitlines()[-1].startswith("nearest of 100 labelled images: teacher ")


@TAKES_LONG
def test_vit_to_mobilenet(example: Any) -> None:
    of_teacher, of_student = example("vit_to_mobilenet").main(epochs=2)
    assert of_teacher > 30
    assert of_student > 30


@pytest.mark.slow
def test_the_notebook() -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install nbclient ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install nbclient ipykernel")
    notebook = nbformat.read(EXAMPLES / "demo.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "committed without outputs"
    nbclient.NotebookClient(notebook, timeout=250, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    top1 = {name: float(found) for name, found in re.findall(r"(\w+): ([\d.]+) %", printed)}
    assert top1["teacher"] > 95
    assert top1["MIMKD"] > top1["alone"] + 3
    plots = [output for output in outputs if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert [len(plot["data"]["application/vnd.plotly.v1+json"]["data"]) for plot in plots] == [3, 3]


def same_state(found: dict[str, Any], expected: torch.nn.Module) -> bool:
    return found.keys() == expected.state_dict().keys() and all(
        torch.equal(found[name], value) for name, value in expected.state_dict().items()
    )


def test_with_lightning(example: Any, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed: pip install lightning")
    options = {"default_root_dir": tmp_path, "accelerator": "cpu", "enable_progress_bar": False}
    trained = example("with_lightning").main(epochs=1, accumulate_grad_batches=2, limit_train_batches=8, **options)
    own = trained.distiller
    assert own.step == 4, "eight batches of 50, two a step"
    assert int(own.loss.queue.filled_Q.sum()) == 400
    (file,) = tmp_path.rglob("*.ckpt")
    state = torch.load(file, weights_only=False)["state_dict"]
    assert same_state({name.removeprefix("distiller."): value for name, value in state.items()}, own)
    mixed = example("with_lightning").main(1, precision="bf16-mixed", limit_train_batches=3, logger=False, **options)
    assert mixed.distiller.step == 3
    assert all(torch.isfinite(parameter).all() for parameter in mixed.parameters())


def test_with_accelerate(example: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
    own, prepared = example("with_accelerate").main(1, accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2))
    assert own.step == 14, "28 batches, two a step"
    assert int(own.loss.queue.filled_Q.sum()) == 1400
    assert same_state(prepared.state_dict(), own)
