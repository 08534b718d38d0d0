"""Core ML packages (.mlpackage): coremltools converts on any system, and Core ML runs them on macOS alone."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from mimkd_ray.export.onnx_file import INPUT, OUTPUT
from mimkd_ray.export.pt2_file import MOST, export_any_batch
from mimkd_ray.export.runners import Runner, quiet

RUNS_HERE = sys.platform == "darwin"


def write_coreml(network: nn.Module, example_BCHW: Tensor, path: Path) -> None:
    """Write the network as an ML program at float32, for any batch size."""
    with quiet():
        import coremltools

        program = export_any_batch(network, example_BCHW).run_decompositions({})
        shape = (coremltools.RangeDim(1, MOST, 1), *example_BCHW.shape[1:])
        model = coremltools.convert(
            program,
            inputs=[coremltools.TensorType(name=INPUT, shape=shape)],
            outputs=[coremltools.TensorType(name=OUTPUT)],
            minimum_deployment_target=coremltools.target.iOS16,
            compute_precision=coremltools.precision.FLOAT32,
            skip_model_load=True,
        )
        model.save(str(path))
    (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)  # no part of the package


def coreml_runner(path: Path) -> Runner:
    """Load the package into Core ML."""
    with quiet():
        import coremltools

        model = coremltools.models.MLModel(str(path))

    def run(images_BCHW: Tensor) -> Tensor:
        return torch.from_numpy(model.predict({INPUT: images_BCHW.numpy()})[OUTPUT])

    return run
