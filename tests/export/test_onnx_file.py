"""ONNX files of networks whose operations are not those of convolutions, against the networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimkd_ray.export.deployed import Deployed
from mimkd_ray.export.int8 import quantize_onnx
from mimkd_ray.export.onnx_file import onnx_runner, write_onnx

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)


class Attention(nn.Module):
    """As a ViT has it, on pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.output = nn.Linear(3, 24), nn.Linear(8, 5)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        heads = self.input(images_BCHW.flatten(2).mT).unflatten(2, (2, 12)).transpose(1, 2)
        return self.output(F.scaled_dot_product_attention(*heads.chunk(3, 3)).transpose(1, 2).flatten(2).mean(1))


def test_attention_is_written_and_quantised(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Deployed(Attention(), (0, 0, 0), (1, 1, 1), False)
    images = torch.randn(8, 3, 4, 4)
    files = tmp_path / "float32.onnx", tmp_path / "int8.onnx"
    write_onnx(network, images[:2], files[0])
    quantize_onnx(files[0], [images], files[1], narrow=True)
    expected = network(images)
    for file, tolerance in zip(files, (1e-5, 0.05), strict=True):
        torch.testing.assert_close(onnx_runner(file, 1)(images), expected, atol=tolerance, rtol=0)
