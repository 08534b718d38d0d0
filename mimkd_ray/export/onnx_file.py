"""ONNX files: written by torch's exporter for any batch size, run by ONNX Runtime."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimkd_ray.export.deployed import Deployed
from mimkd_ray.export.runners import Runner, quiet

INPUT, OUTPUT = "images", "logits"
BEFORE_ATTENTION = 22
"""The last operator set without `Attention`, which torch's exporter cannot bring to every later set, and which ONNX
Runtime's quantiser does not know; before it attention is matrix products and a softmax."""


def write_onnx(network: Deployed, example_BCHW: Tensor, path: Path) -> None:
    """Write the network at float32, for any batch size."""
    import onnx

    model = _exported(network, example_BCHW, newest_opset())
    if any(node.op_type == "Attention" for node in model.graph.node):
        model = _exported(network, example_BCHW, BEFORE_ATTENTION)
    onnx.save(_without_notes(model), path)


def _exported(network: Deployed, example_BCHW: Tensor, opset: int) -> Any:
    with quiet():
        program = torch.onnx.export(
            network,
            (example_BCHW,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _without_notes(model: Any) -> Any:
    """The model without the stack traces that torch puts into it: they name folders of this machine."""
    graph = model.graph
    for part in (
        graph,
        *graph.node,
        *graph.value_info,
        *graph.initializer,
        *graph.input,
        *graph.output,
        *model.functions,
    ):
        part.doc_string = ""
        del part.metadata_props[:]
    return model


@cache
def newest_opset() -> int:
    """The newest operator set that ONNX Runtime has kernels for: those of int8 come last."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    for opset in range(onnx.defs.onnx_opset_version(), 18, -1):
        graph = helper.make_graph(
            [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])],
            "probe",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
            [helper.make_tensor_value_info("y", TensorProto.INT8, [1])],
            [
                helper.make_tensor("scale", TensorProto.FLOAT, [], [0.5]),
                helper.make_tensor("zero", TensorProto.INT8, [], [0]),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        try:
            onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        except Exception:  # onnxruntime has no public class for what it does not implement
            continue
        return opset
    return 18


def onnx_runner(path: Path, threads: int) -> Runner:
    """Load the file into ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images_BCHW: Tensor) -> Tensor:
        (logits_BC,) = session.run([OUTPUT], {INPUT: images_BCHW.numpy()})
        return torch.from_numpy(logits_BC)

    return run
