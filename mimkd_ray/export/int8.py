"""int8 by static quantisation after training: weights per channel, ranges of activations from training images."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from mimkd_ray import local_files
from mimkd_ray.export.deployed import Deployed
from mimkd_ray.export.onnx_file import INPUT
from mimkd_ray.export.pt2_file import export_any_batch, write_pt2
from mimkd_ray.export.runners import quiet

BATCH = 8
"""Calibration images of a range that is averaged: MobileNetV2 keeps 81.2 of its 81.6 % top-1 with 8, 80.8 with 32."""


def quantize_onnx(source: Path, batches: Iterable[Tensor], path: Path, *, narrow: bool) -> None:
    """Write the ONNX file at ``source`` with ONNX Runtime's quantisation, in the QDQ form, calibrated on the batches.

    Ranges are the smallest and largest values of BATCH images, averaged over the batches, so that single values count
    less. ONNX Runtime's percentiles and entropy take minutes for networks of ImageNet's size.

    ``narrow`` takes activations of 0..255 and weights of -64..64, for which ONNX Runtime has its fastest kernels on
    x86. Weights of all 8 bits would overflow there on processors without VNNI (two products are summed in 16 bits).
    Without it, activations and weights have 8 bits with a sign.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = (few for batch in batches for few in batch.split(BATCH))

        def get_next(self) -> dict[str, object] | None:
            images = next(self.left, None)
            return None if images is None else {INPUT: images.numpy()}

    with local_files.scratch("quantise") as folder, quiet():
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared))
        quantize_static(
            str(prepared),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=narrow,
            activation_type=QuantType.QUInt8 if narrow else QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={"CalibMovingAverage": True},
        )


def quantize_pt2(network: Deployed, example_BCHW: Tensor, batches: Iterable[Tensor], path: Path) -> None:
    """Write the network with PT2E's quantisation (torchao), calibrated on the batches, as a .pt2 file.

    The file holds int8 weights and the operations of quantisation around float ones, for a compiler to merge.
    """
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
            X86InductorQuantizer,
            get_default_x86_inductor_quantization_config,
        )

        quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(export_any_batch(network, example_BCHW).module(), quantizer)
        with torch.no_grad():
            for images in batches:
                prepared(images)
        converted = convert_pt2e(prepared)
        _drop_unused(converted)
        write_pt2(converted, example_BCHW, path)


def _drop_unused(module: torch.fx.GraphModule) -> None:
    """Remove the tensors that no operation reads: the float weights, whose int8 form takes their place."""
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in (*module.named_parameters(), *module.named_buffers())]:
        if name not in used:
            parent, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(parent), leaf)


def has_pt2e() -> bool:
    """Return whether torchao is installed."""
    return find_spec("torchao") is not None
