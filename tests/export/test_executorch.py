"""ExecuTorch programs: what is written is run by ExecuTorch's own runtime, and its logits are the student's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mimkd_ray.__main__ import main
from mimkd_ray.models.build_model import build_model

pytest.importorskip("executorch", reason="executorch is not installed: pip install mimkd-ray[executorch]")


def test_a_program(tmp_path: Path) -> None:
    from executorch.runtime import Runtime

    student = build_model("cifar/resnet8_w4", 10).eval()
    torch.save(student.state_dict(), tmp_path / "w.pth")
    out = tmp_path / "out"
    named = ["--network", "cifar/resnet8_w4", "--weights", str(tmp_path / "w.pth"), "--data.root", "digits"]
    assert (
        main(["export", *named, "--images", "40", "--threads", "1", "--out", str(out), "--formats", "executorch"]) == 0
    )
    program = out / "student.pte"
    figures = json.loads((out / "export.json").read_text())["files"]["executorch"]
    assert figures["file"] == program.name
    assert figures["agreement"] == 100
    assert figures["max_logit_difference"] < 1e-4
    assert 'load_program("student.pte")' in (out / "README.md").read_text()
    assert str(Path(__file__).parents[2]).encode() not in program.read_bytes(), "a folder of this machine"
    image = torch.rand(1, 3, 32, 32)
    loaded = Runtime.get().load_program(program)
    with torch.no_grad():
        torch.testing.assert_close(loaded.load_method("forward").execute([image])[0], student(image))
